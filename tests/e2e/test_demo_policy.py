"""The embedded policy acts: what its table says is seen again in a few episodes."""

import pytest

import torchpi
from torchpi.sim.evaluate import evaluate

TASKS = ("drawer-open", "button-press-topdown", "window-close", "door-open", "faucet-open", "faucet-close")


def test_embedded_policy_is_a_small_pi05_with_provenance():
    policy = torchpi.load_policy("demo")
    config = policy.model.config
    assert config.pi05
    assert config.discrete_state_input
    assert 1.5e6 < sum(parameter.numel() for parameter in policy.model.parameters()) < 6e6
    assert tuple(policy.provenance["tasks"]) == TASKS
    assert {"recipe", "dataset", "results"} <= set(policy.provenance)


@pytest.mark.slow
def test_it_succeeds_in_most_tasks():
    """One episode per task, always the same; a CPU that rounds otherwise may lose one, not three."""
    result = evaluate("demo", "metaworld", episodes=1, seed=1, workers=1, progress=False)
    assert set(result.tasks) == set(TASKS)
    successes = [episode.task for episode in result.episodes if episode.success]
    assert len(successes) >= 4, f"only {successes}"


@pytest.mark.slow
def test_it_reads_its_instruction_and_sees():
    faucets = {"faucet-open": "close the faucet", "faucet-close": "open the faucet"}
    swapped = evaluate("demo", "metaworld", tasks=list(faucets), episodes=3, instructions=faucets, progress=False)
    assert swapped.success_rate <= 0.2
