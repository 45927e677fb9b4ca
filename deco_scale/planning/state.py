"""How often a rank holds the parameters: as weights, gradients, moments, average."""


def held_of_state(engine: str, zero_stage: int) -> tuple[int, int]:
    """Copies of a rank's dp part, and of its whole tp part, all in fp32.

    fsdp cuts weights, gradients, two moments and the average. DeepSpeed keeps masters beside the weights and
    cuts, stage by stage: masters, moments and average (1), gradients (2), weights (3). fsdp and ZeRO-3
    are measured by ``tests/distributed/test_memory.py``; the others are counted from what they mean.
    """
    if engine == "fsdp":
        return 5, 0
    return {0: (0, 5), 1: (4, 2), 2: (5, 1), 3: (6, 0)}[zero_stage]
