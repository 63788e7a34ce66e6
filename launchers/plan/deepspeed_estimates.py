"""What DeepSpeed's own estimators of model states give, to the byte; pure, without DeepSpeed.

They count the states of mixed precision with AdamW alone: no activations, buckets, gathered layers
beyond one, logits or fragments; what each of them leaves out is said in docs/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass

BUFFER_FACTOR = 1.5
"""By which DeepSpeed multiplies what it counts of host memory (``additional_buffer_factor``)."""


@dataclass(frozen=True)
class Estimate:
    """One row of DeepSpeed's tables."""

    stage: int
    offloads_optimizer: bool
    offloads_parameters: bool
    zero_init: bool
    """Whether the model is divided as it is built; stage 2 has no such choice."""
    host_bytes: int
    """Of a node."""
    device_bytes: int


def estimates(parameters: int, largest_layer: int, devices: int, nodes: int = 1) -> list[Estimate]:
    """Return every row of both tables, stage 2 first, each in DeepSpeed's order. Pure.

    ``devices`` are those of a node, ``largest_layer`` what the module with the most parameters of
    its own has.
    """
    rows = []
    for offloads in (True, False):
        host, device = zero2(parameters, devices, nodes, offloads_optimizer=offloads)
        rows.append(Estimate(2, offloads, False, False, host, device))
    for optimizer, of_parameters in ((True, True), (True, False), (False, False)):
        for zero_init in (True, False):
            host, device = zero3(
                parameters,
                largest_layer,
                devices,
                nodes,
                offloads_optimizer=optimizer,
                offloads_parameters=of_parameters,
                zero_init=zero_init,
            )
            rows.append(Estimate(3, optimizer, of_parameters, zero_init, host, device))
    return rows


def zero2(
    parameters: int, devices: int, nodes: int = 1, *, offloads_optimizer: bool
) -> tuple[int, int]:
    """Return bytes of a node's host and of a device at stage 2. Pure.

    Source: `estimate_zero2_model_states_mem_needs`, deepspeed 0.19.8, zero/stage_1_and_2.py.
    For each parameter a device holds 2 bytes of it, and of its shard 18: 2 of gradient, 4 of the
    same in fp32, 4 of master weight, 8 of moments. Offloaded, the host holds 16 of each, or 4 for
    each of all devices where that is more: a whole fp32 model in each process before it is divided.
    """
    ranks = devices * nodes
    if offloads_optimizer:
        host = parameters * max(4 * ranks, 16) * BUFFER_FACTOR
        return int(host), 2 * parameters
    host = parameters * 4 * devices * BUFFER_FACTOR
    return int(host), 2 * parameters + int(18 * parameters / ranks)


def zero3(
    parameters: int,
    largest_layer: int,
    devices: int,
    nodes: int = 1,
    *,
    offloads_optimizer: bool,
    offloads_parameters: bool,
    zero_init: bool,
) -> tuple[int, int]:
    """Return bytes of a node's host and of a device at stage 3. Pure.

    Source: `estimate_zero3_model_states_mem_needs`, deepspeed 0.19.8, runtime/zero/stage3.py. A
    device holds the largest layer gathered, parameter and gradient (4 bytes), and of its shard 18
    bytes for each parameter, 2 where the optimizer is offloaded, none where parameters are, too.
    The host of a node holds its part of 18 or 16 bytes for each; and where the model is not divided
    as it is built, at least a whole fp32 model for each of its processes.
    """
    ranks, part_of_node = devices * nodes, 1 / nodes
    gathered = 4 * largest_layer
    if not offloads_optimizer:
        built = largest_layer if zero_init else parameters
        host = built * 4 * devices * BUFFER_FACTOR
        return int(host), gathered + int(18 * parameters / ranks)
    each = 18 if offloads_parameters else 16
    device = gathered if offloads_parameters else gathered + int(2 * parameters / ranks)
    if zero_init:
        # In DeepSpeed's order, on which the last bits of a float depend.
        return int(parameters * each * part_of_node * BUFFER_FACTOR), device
    host = parameters * max(4 * devices, each * part_of_node) * BUFFER_FACTOR
    return int(host), device
