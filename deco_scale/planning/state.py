"""How often a rank holds the parameters: as weights, masters, gradients, moments, average."""

STATE_PARTS = ("weights", "masters", "gradients", "moments", "average")


def state_by_part(engine: str, zero_stage: int) -> dict[str, tuple[int, int]]:
    """For each part: copies of a rank's dp part, and of its whole tp part, all in fp32.

    fsdp cuts weights, gradients, two moments and the average. DeepSpeed keeps masters beside the weights and
    cuts, stage by stage: masters, moments and average (1), gradients (2), weights (3). fsdp and ZeRO-3
    are measured by ``tests/distributed/test_memory.py``; the others are counted from what they mean.
    """
    cut, whole = (1, 0), (0, 1)
    if engine == "fsdp":
        return {"weights": cut, "gradients": cut, "moments": (2, 0), "average": cut}
    if zero_stage == 0:
        return {"weights": whole, "gradients": whole, "moments": (0, 2), "average": whole}
    return {
        "weights": cut if zero_stage == 3 else whole,
        "masters": cut,
        "gradients": cut if zero_stage >= 2 else whole,
        "moments": (2, 0),
        "average": cut,
    }


def held_of_state(engine: str, zero_stage: int) -> tuple[int, int]:
    """Copies of a rank's dp part, and of its whole tp part, over all of :func:`state_by_part`."""
    parts = state_by_part(engine, zero_stage).values()
    return sum(cut for cut, _ in parts), sum(whole for _, whole in parts)
