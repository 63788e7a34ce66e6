"""From metrics to pictures: series, what is drawn of them, charts as Vega-Lite. No torch."""
