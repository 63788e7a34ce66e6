// The search runs in a worker, and no browser starts one from file://: there a hidden frame does
// the same. The offline plugin takes a script of this name for its own, which it would load from the
// network.
class FrameWorker extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    frame.srcdoc = "<!doctype html><title>search</title>"
    this.frame = frame
    this.started = new Promise((resolve, reject) => {
      frame.addEventListener("load", () => {
        const inside = frame.contentWindow
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = inside.document.createElement("script")
        script.addEventListener("load", () => resolve(inside))
        script.addEventListener("error", reject)
        script.src = url
        inside.document.body.append(script)
      }, { once: true })
    })
    document.body.append(frame)
  }

  postMessage(data) {
    this.started.then(inside => inside.dispatchEvent(new MessageEvent("message", { data })))
  }

  terminate() {
    this.frame.remove()
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker
