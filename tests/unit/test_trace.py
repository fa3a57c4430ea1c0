"""`torchpi trace`: shapes against a table written by hand, and what it prints and draws."""

import copy
import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from rich.console import Console

from torchpi.cli import main
from torchpi.config import PRESETS
from torchpi.data import LeRobotDataset, LeRobotWriter
from torchpi.demo import demo_observation
from torchpi.inspect.commands import run_trace
from torchpi.inspect.inputs import Shapes, Source, find_inputs, inputs_of_config, inputs_of_policy, observation_of
from torchpi.inspect.page import render_page
from torchpi.inspect.steps import STEPS as ALL_STEPS
from torchpi.inspect.steps import formula_of
from torchpi.inspect.summary import Pair, compare_facts, compare_steps, facts, phases
from torchpi.inspect.text import print_trace
from torchpi.inspect.trace import TraceEntry, trace_forward, trace_steps
from torchpi.policy import load_policy

STEPS = ["0", "1", "2", "3", "4", "5", "6", *(f"7-{i}" for i in range(1, 8)), "8", "9", "10", "11", "inference"]
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")

# Step, name and shape, derived by hand from the papers.
BOTH = [
    *(("0", f"image/{camera}", (4, 224, 224, 3), "uint8") for camera in CAMERAS),
    *(("0", f"image_mask/{camera}", (4,), "bool") for camera in CAMERAS),
    *(("1", f"image/{camera}", (4, 224, 224, 3), "float32") for camera in CAMERAS),
    ("2", "patches/base_0_rgb", (4, 256, 588), "float32"),
    ("2", "patch_embedding/base_0_rgb", (4, 256, 1152), "float32"),
    ("2", "layer_0/q/base_0_rgb", (4, 256, 16, 72), "float32"),
    ("2", "layer_26/out/base_0_rgb", (4, 256, 1152), "float32"),
    *(("2", f"image_tokens/{camera}", (4, 256, 2048), "float32") for camera in CAMERAS),
    ("3", "embedding_table", (257152, 2048), "float32"),
    ("4", "image_mask/base_0_rgb", (4, 256), "bool"),
    ("4", "image_tokens", (4, 768, 2048), "float32"),
    ("5", "sinusoid_input", (4, 512), "float32"),
    ("5", "posemb_sincos", (4, 1024), "float32"),
]
PI05 = [
    *BOTH,
    ("0", "tokenized_prompt", (4, 200), "int64"),
    ("0", "tokenized_prompt_mask", (4, 200), "bool"),
    ("0", "actions", (4, 50, 32), "float32"),
    ("1", "state", (4, 32), "float32"),
    ("3", "text_tokens", (4, 200, 2048), "float32"),
    ("4", "prefix_tokens", (4, 968, 2048), "float32"),
    ("4", "prefix_mask", (4, 968), "bool"),
    ("4", "prefix_ar_mask", (968,), "bool"),
    ("5", "x_t", (4, 50, 32), "float32"),
    ("5", "action_in_proj", (4, 50, 1024), "float32"),
    ("5", "adarms_cond", (4, 1024), "float32"),
    ("5", "suffix_tokens", (4, 50, 1024), "float32"),
    ("5", "suffix_ar_mask", (50,), "bool"),
    ("6", "attn_mask", (4, 1018, 1018), "bool"),
    ("6", "positions", (4, 1018), "int64"),
    ("6", "prefix/attn_mask", (4, 968, 968), "bool"),
    ("6", "suffix/attn_mask", (4, 50, 1018), "bool"),
    ("7-1", "prefix/variance", (4, 968, 1), "float32"),
    ("7-1", "suffix/variance", (4, 50, 1), "float32"),
    ("7-1", "prefix/normed", (4, 968, 2048), "float32"),
    ("7-1", "suffix/normed", (4, 50, 1024), "float32"),
    *(("7-1", f"suffix/{part}", (4, 1, 1024), "float32") for part in ("scale", "shift", "gate")),
    ("7-2", "prefix/q", (4, 968, 8, 256), "float32"),
    ("7-2", "suffix/q", (4, 50, 8, 256), "float32"),
    ("7-2", "prefix/k", (4, 968, 1, 256), "float32"),
    ("7-3", "q", (4, 1018, 8, 256), "float32"),
    ("7-3", "k", (4, 1018, 1, 256), "float32"),
    ("7-4", "q_grouped", (4, 1018, 1, 8, 256), "float32"),
    ("7-4", "logits", (4, 1, 8, 1018, 1018), "float32"),
    ("7-4", "probs", (4, 1, 8, 1018, 1018), "float32"),
    ("7-4", "prefix/logits", (4, 1, 8, 968, 968), "float32"),
    ("7-4", "suffix/logits", (4, 1, 8, 50, 1018), "float32"),
    ("7-5", "prefix/attn_proj", (4, 968, 2048), "float32"),
    ("7-5", "suffix/attn_proj", (4, 50, 1024), "float32"),
    ("7-6", "prefix/x", (4, 968, 2048), "float32"),
    ("7-6", "suffix/x", (4, 50, 1024), "float32"),
    ("7-7", "prefix/ffw_hidden", (4, 968, 16384), "float32"),
    ("7-7", "suffix/ffw_hidden", (4, 50, 4096), "float32"),
    ("7-7", "suffix/gate", (4, 1, 1024), "float32"),
    ("7-7", "prefix/x_out", (4, 968, 2048), "float32"),
    ("8", "suffix/layer_17", (4, 50, 1024), "float32"),
    ("8", "modulation/layer_17/pre_ffw_norm", (4, 3072), "float32"),
    ("8", "cache/layer_17/v", (4, 968, 1, 256), "float32"),
    ("9", "prefix_out", (4, 968, 2048), "float32"),
    ("9", "suffix_out", (4, 50, 1024), "float32"),
    ("9", "modulation/final_norm", (4, 3072), "float32"),
    ("10", "v_t", (4, 50, 32), "float32"),
    ("11", "loss", (4, 50), "float32"),
    ("inference", "cache/layer_17/k", (1, 968, 1, 256), "float32"),
    ("inference", "attn_mask", (1, 50, 1018), "bool"),
    ("inference", "positions", (1, 50), "int64"),
    *(("inference", f"x_t/t={t:g}", (1, 50, 32), "float32") for t in (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)),
    ("inference", "action_chunk", (1, 50, 32), "float32"),
]
PI0 = [
    *BOTH,
    ("0", "tokenized_prompt", (4, 16), "int64"),
    ("0", "actions", (4, 32, 7), "float32"),
    ("1", "state", (4, 7), "float32"),
    ("4", "prefix_tokens", (4, 784, 2048), "float32"),
    ("5", "state_proj", (4, 1024), "float32"),
    ("5", "action_and_time", (4, 32, 2048), "float32"),
    ("5", "action_time_mlp_out", (4, 32, 1024), "float32"),
    ("5", "suffix_tokens", (4, 33, 1024), "float32"),
    ("6", "attn_mask", (4, 817, 817), "bool"),
    ("6", "suffix/attn_mask", (4, 33, 817), "bool"),
    ("7-3", "q", (4, 817, 8, 256), "float32"),
    ("7-4", "logits", (4, 1, 8, 817, 817), "float32"),
    ("9", "suffix_out", (4, 33, 1024), "float32"),
    ("10", "action_out", (4, 32, 1024), "float32"),
    ("10", "v_t", (4, 32, 7), "float32"),
    ("11", "loss", (4, 32), "float32"),
    ("inference", "cache/layer_0/k", (1, 784, 1, 256), "float32"),
    ("inference", "action_chunk", (1, 32, 7), "float32"),
]


@pytest.fixture(scope="module")
def pi05():
    return trace_forward(find_inputs("pi05", Shapes()))


@pytest.fixture(scope="module")
def pi0():
    return trace_forward(find_inputs("pi0", Shapes()))


@pytest.fixture(scope="module")
def policy():
    return load_policy("demo", device="cpu")


@pytest.fixture(scope="module")
def tiny(policy):
    return trace_forward(inputs_of_policy(policy, Shapes(batch=2), demo_observation(), title="tiny"))


def counts(trace):
    return {entry.name: entry.value for entry in trace.entries if isinstance(entry.value, int)}


@pytest.mark.parametrize(("name", "table"), [("pi05", PI05), pytest.param("pi0", PI0, marks=pytest.mark.slow)])
def test_full_size_shapes(name, table, request):
    trace = request.getfixturevalue(name)
    found = {(entry.step, entry.name): (entry.shape, entry.dtype) for entry in trace.entries}
    expected = {(step, tensor): (shape, dtype) for step, tensor, shape, dtype in table}
    assert {key: found.get(key) for key in expected} == expected
    assert list(dict.fromkeys(entry.step for entry in trace.entries)) == STEPS


def test_views(pi05):
    views = {(entry.step, entry.name): entry.view for entry in pi05.entries}
    assert [views["6", "attn_mask"], views["6", "prefix/attn_mask"], views["7-2", "prefix/q"]] == [
        "joint",
        "cached",
        "both",
    ]
    assert [views["7-4", "logits"], views["7-4", "suffix/logits"]] == ["joint", "cached"]
    assert views["9", "prefix_out"] == "joint"


def test_counts(pi05, pi0):
    common = {"layers": 18, "prefills": 1, "euler_steps": 10}
    assert counts(pi05) == common | {"time_injections": 36, "time_inputs": 37}
    assert counts(pi0) == common | {"time_injections": 0, "time_inputs": 1}
    assert (pi05.num_groups, pi0.num_groups) == (2, 3)
    assert sum(pi05.parameters.values()) == 3_353_433_872
    assert pi05.cache_bytes == 18 * 2 * 968 * 256 * 4


def test_comparison_separates_architecture_and_sizes(pi05, pi0):
    facts = compare_facts(pi0, pi05)
    assert list(facts) == ["architecture", "sizes"]
    assert Pair("time injections, all", "1", "37") in facts["architecture"]
    assert Pair("sequence length", "817", "1018") in facts["sizes"]
    assert Pair("KV cache of one observation", "28.9 MB in float32", "35.7 MB in float32") in facts["sizes"]
    steps = compare_steps(pi0, pi05)
    assert list(steps) == STEPS
    kinds = {pair: pair.kind for step in steps.values() for pair in step}
    assert kinds[Pair("adarms_cond", "—", "[4, 1024]")] == "architecture"
    assert kinds[Pair("state_proj", "[4, 1024]", "—")] == "architecture"
    assert kinds[Pair("suffix_tokens", "[4, 33, 1024]", "[4, 50, 1024]")] == "size"
    assert kinds[Pair("image_tokens/‹camera›", "3 × [4, 256, 2048]", "3 × [4, 256, 2048]")] == "same"
    found = phases(pi05)
    assert found["training only"] == ["actions", "u_t", "loss"]
    assert found["inference only"] == ["action_chunk"]
    assert "logits" in found["joint view only"]


@pytest.mark.parametrize(
    ("pi05", "stated", "state"),
    [
        (True, None, "text in the prompt"),  # an openpi checkpoint does not state it, so the variant decides
        (False, None, "token of the suffix"),
        (True, False, "not read"),
        (False, True, "text in the prompt and token of the suffix"),
    ],
)
def test_facts_say_how_the_state_is_read(pi05, stated, state):
    config = dataclasses.replace(PRESETS["tiny"], pi05=pi05, discrete_state_input=stated)
    trace = trace_forward(inputs_of_config(config, Shapes(batch=1)))
    assert facts(trace)["architecture"]["state"] == state


@pytest.mark.slow
def test_compared_models_can_have_the_same_sizes(capsys):
    sizes = Shapes(batch=1, max_token_len=48, action_horizon=50, action_dim=32)
    pi0, pi05 = (trace_forward(find_inputs(name, sizes)) for name in ("pi0", "pi05"))
    assert {pair.name for pair in compare_facts(pi0, pi05)["sizes"] if pair.kind != "same"} == {
        "sequence length",
        "suffix tokens",
        "parameters",
    }


def test_targets_are_compared_in_the_given_order(capsys):
    run_trace(["pi0", "pi05"], Shapes(batch=1), Source(), as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert (document["left"]["title"], document["right"]["title"]) == ("pi0", "pi05")


def test_formulas_of_a_full_trace(pi05, pi0):
    """Every computed tensor has a formula; inputs have none."""
    inputs = {"tokenized_prompt_mask", "suffix_mask", "suffix_ar_mask", "embedding_table", "state", "prefix_tokens"}
    for trace in (pi05, pi0):
        lacking = {e.name for e in trace.entries if not e.formula and not isinstance(e.value, int)}
        assert {name for name in lacking - inputs if not name.endswith("/x") and not name.startswith("time/")} == set()
    assert formula_of("7-6", "suffix/x", pi05=True) == "x + attn_proj · gate"
    assert formula_of("7-6", "suffix/x", pi05=False) == "x + attn_proj"
    assert [step.id for step in ALL_STEPS] == STEPS


def test_every_formula_belongs_to_a_tensor(pi05, pi0, tiny):
    found = {entry.formula for trace in (pi05, pi0, tiny) for entry in trace.entries}
    stated = {
        formula
        for step in ALL_STEPS
        for formulas in (step.formulas, step.formulas_pi05, step.formulas_pi0)
        for formula in formulas.values()
    }
    assert stated <= found


def test_sizes_can_be_changed():
    config = dataclasses.replace(PRESETS["tiny"], image_size=32)
    entries = trace_steps(config, batch=1, max_token_len=7, action_horizon=5, action_dim=3)
    shapes = {(entry.step, entry.name): entry.shape for entry in entries}
    assert shapes["0", "tokenized_prompt"] == (1, 7)
    assert shapes["10", "v_t"] == (1, 5, 3)
    assert shapes["6", "attn_mask"] == (1, 3 * 4 + 7 + 5, 3 * 4 + 7 + 5)


def test_a_model_of_one_layer_is_traced():
    tiny = PRESETS["tiny"]
    one = {part: dataclasses.replace(getattr(tiny, part), depth=1) for part in ("paligemma", "action_expert")}
    config = dataclasses.replace(tiny, paligemma_variant=one["paligemma"], action_expert_variant=one["action_expert"])
    assert {entry.step for entry in trace_steps(config, batch=1)} == set(STEPS)


def test_joint_and_cached_agree_on_real_weights(tiny):
    assert tiny.values is not None
    assert len(tiny.values.agreement) == 3
    assert all(pair.max_abs <= 1e-5 and pair.scale > 0.01 for pair in tiny.values.agreement)


@torch.no_grad()
def test_trace_computes_the_chunk_and_loss_of_the_model(policy, tiny):
    inputs = inputs_of_policy(policy, Shapes(batch=2), demo_observation())
    observation = observation_of(inputs.batch)
    chunk = policy.model.sample_actions(observation, noise=inputs.noise[:1].expand(2, -1, -1))
    assert np.abs(tiny.values.chunk[-1] - chunk[0].numpy()).max() <= 1e-5
    actions = torch.from_numpy(tiny.values.chunk[-1]).expand_as(inputs.noise)
    loss = policy.model.compute_loss(observation, actions, noise=inputs.noise, time=inputs.time)
    stats = {(entry.step, entry.name): entry.stats for entry in tiny.entries}
    assert abs(stats["11", "loss"].mean - loss.mean().item()) <= 1e-5


def test_images_are_traced_with_their_padding(policy):
    wide = demo_observation() | {"base": np.full((48, 96, 3), 255, np.uint8)}
    trace = trace_forward(inputs_of_policy(policy, Shapes(batch=1), wide))
    stats = {(entry.step, entry.name): entry.stats for entry in trace.entries}
    assert (stats["1", "image/base_0_rgb"].min, stats["1", "image/base_0_rgb"].max) == (-1.0, 1.0)  # the letterbox


def test_golden_batch_and_checkpoint_without_sizes(golden):
    batch = golden.root / "inputs.npz"
    trace = trace_forward(
        find_inputs(str(golden.checkpoint), Shapes(batch=2), Source(batch), config=str(golden.config))
    )
    stats = {(entry.step, entry.name): entry.stats for entry in trace.entries}
    assert abs(stats["10", "v_t"].max - golden.outputs["v_t"].max().item()) <= 2e-5
    assert abs(stats["11", "loss"].mean - golden.outputs["loss"].mean().item()) <= 2e-5
    assert not trace.mask.diagonal().all()  # the drawn mask includes the padding
    bare = trace_forward(find_inputs(str(golden.checkpoint), Shapes(batch=1)))
    assert any("default: action_horizon 50" in note for note in bare.inputs.notes)
    assert any("random numbers" in note for note in bare.inputs.notes)
    length = 200 if golden.kind == "pi05" else 48
    assert next(entry.shape for entry in bare.entries if entry.name == "tokenized_prompt") == (1, length)


def test_policy_folder(policy, tmp_path):
    policy.save(tmp_path / "policy")
    trace = trace_forward(find_inputs(str(tmp_path / "policy"), Shapes(batch=1)))
    assert trace.values is not None
    assert trace.inputs.action_names == ("delta_x", "delta_y", "delta_z", "gripper")
    assert any("No observation was given" in note for note in trace.inputs.notes)


def test_dataset_gives_observation_and_actions(policy, tmp_path):
    robot, observation = policy.embodiment, demo_observation()
    names = [action.name for action in robot.actions]
    rng = np.random.default_rng(0)
    with LeRobotWriter(
        tmp_path / "set",
        fps=80,
        cameras={"base": (96, 96, 3), "wrist": (96, 96, 3)},
        state_names=list(robot.state_names),
        action_names=names,
    ) as writer:
        for _ in range(2):
            for _ in range(20):
                frame = {f"observation.images.{key}": observation[key] for key in ("base", "wrist")}
                writer.add_frame(
                    frame | {"observation.state": observation["state"], "action": rng.uniform(-1, 1, len(names))}
                )
            writer.save_episode("open the drawer")
    source = Source(dataset=str(tmp_path / "set"), episode=1, frame=3)
    inputs = find_inputs("demo", Shapes(batch=1), source)
    trace = trace_forward(inputs)
    assert any("frame 3 of episode 1" in note for note in trace.inputs.notes)
    assert not any("--dataset" in note for note in trace.inputs.notes)
    without = find_inputs("demo", Shapes(batch=1), Source(demo=observation))
    assert any("The loss is computed for a chunk sampled by the model itself" in note for note in without.notes)
    frames = LeRobotDataset(tmp_path / "set", action_horizon=16, episodes=[1])
    chunk = policy.transforms.inverse(inputs.actions[0].numpy(), action_size=len(names))
    np.testing.assert_allclose(chunk, frames[3]["action"], atol=1e-5)
    loss = policy.model.compute_loss(
        observation_of(inputs.batch), inputs.actions, noise=inputs.noise, time=inputs.time
    ).mean()
    stats = {(entry.step, entry.name): entry.stats for entry in trace.entries}
    assert stats["11", "loss"].mean == pytest.approx(loss.item(), abs=1e-5)
    assert ("0", "robot/actions") in stats
    with pytest.raises(ValueError, match="Episode 1 has the frames 0 to 19, got 20"):
        find_inputs("demo", Shapes(), dataclasses.replace(source, frame=20))


def test_step_0_begins_at_the_robots_observation(tiny, policy):
    texts = {entry.name: entry.value for entry in tiny.entries if entry.dtype == "str"}
    assert texts["robot/prompt"] == texts["embodiment/prompt"] == "open the drawer"
    assert texts["prompt_text"] == tiny.inputs.prompt
    assert texts["prompt_text"].startswith("Task: open the drawer, State: ")
    names = [entry.name for entry in tiny.entries if entry.step == "0"]
    order = ["robot/base", "embodiment/state", "normalized_state", "prompt_text", "token_ids", "tokenized_prompt"]
    assert [name for name in names if name in order] == order
    actions = next(entry for entry in tiny.entries if entry.name == "robot_actions")
    assert (actions.shape, actions.dtype) == ((16, policy.embodiment.action_size), "float32")


def test_mask_labels_are_aligned_with_their_tokens(tiny):
    parts = {segment.label: segment.stop - segment.start for segment in tiny.segments}
    valid = tiny.mask.diagonal()
    assert parts["prompt"] + parts["padding"] == 64
    for segment in tiny.segments:
        assert valid[segment.start : segment.stop].all() == (segment.label != "padding")


def test_json_is_one_document_on_stdout(capsys, tmp_path):
    run_trace(["tiny"], Shapes(batch=1), Source(), as_json=True, html=tmp_path / "page.html")
    out, err = capsys.readouterr()
    entries = json.loads(out)
    assert {"step", "name", "shape", "dtype", "view", "phase"} <= set(entries[0])
    assert all(isinstance(size, int) for entry in entries for size in entry["shape"])
    assert "page.html" in err
    run_trace(["tiny", "tiny"], Shapes(batch=1), Source(), as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert {"facts", "steps", "left", "right"} == set(document)


def test_text_fits_its_columns(capsys, tiny):
    run_trace(["tiny", "tiny"], Shapes(batch=1), Source())
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120
    print_trace(tiny, Console(width=160, markup=False))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 160
    assert any("v_t, joint and cached" in line for line in lines)
    assert any("blank, in both" in line for line in lines)


class Tags(html.parser.HTMLParser):
    """Checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.names = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", [pytest.param("tiny", marks=pytest.mark.slow), "pi0", "pi05"])
def test_page_is_well_formed_and_self_contained(name, request):
    trace = request.getfixturevalue(name)
    page = render_page(trace, request.getfixturevalue("pi0"))
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert not {"script", "link", "iframe"} & tags.names
    links = [value for key, value in tags.attributes if key in ("src", "href", "data", "action")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in links)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)
    assert all(address.startswith("#") for address in re.findall(r"url\((.*?)\)", page))
    assert all(f'id="step-{step}"' in page for step in STEPS)


def test_page_of_two_models_begins_with_the_comparison(pi0, pi05):
    page = render_page(pi0, pi05)
    assert "<title>π₀ and π₀.₅</title>" in page
    assert "torchpi trace --compare pi0 pi05" in page
    assert re.findall('<section id="(.*?)"', page) == ["compare", "flow", "mask", "steps", "parameters"]
    assert "<h2>pi0: Step by step</h2>" in page
    assert "parameters</span></div>" not in page  # no tile is about one model only


@pytest.mark.slow
def test_step_tables_fit_a_page_of_1280_pixels(tiny, tmp_path):
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no chromium")
    wide = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)"
    script = f"<script>document.title = 'too wide: ' + {wide}.length</script></body>"
    (tmp_path / "page.html").write_text(render_page(tiny).replace("</body>", script), encoding="utf-8")
    arguments = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--window-size=1280,1600", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    run = subprocess.run([chromium, *arguments], check=True, capture_output=True, timeout=120)
    assert "<title>too wide: 0</title>" in run.stdout.decode()


def test_page_escapes_text_from_files(policy):
    observation = demo_observation() | {"prompt": "<script>alert('π')</script>"}
    trace = trace_forward(inputs_of_policy(policy, Shapes(batch=1), observation, title="<b>"))
    page = render_page(trace)
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    assert "<b></" not in page


def test_all_zero_gates_are_drawn(policy):
    policy = copy.deepcopy(policy)
    for name, parameter in policy.model.named_parameters():
        if ".dense." in name:
            torch.nn.init.zeros_(parameter)
    trace = trace_forward(inputs_of_policy(policy, Shapes(batch=1), demo_observation()))
    assert "Mean 0 at t = 1, 0 at t = 0" in render_page(trace)


@pytest.mark.parametrize(
    ("targets", "sizes", "message"),
    [
        (["pi05"], {"batch": 0}, "batch must be at least 1"),
        (["tiny"], {"action_dim": 3}, "action_dim is 8 in the weights"),
        (["no/such/policy"], {}, "no/such/policy"),
    ],
)
def test_errors(targets, sizes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_trace(targets, Shapes(**sizes), Source())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "trace needs a target, such as torchpi trace pi05"),
        (["--compare"], "trace needs a target"),
        (["--compare", "pi0"], "--compare needs two targets, got 1: pi0"),
        (["pi05", "--compare"], "--compare needs two targets, got 1: pi05"),
        (["pi0", "--compare", "pi05", "tiny"], "--compare needs two targets, got 3: pi0, pi05, tiny"),
    ],
)
def test_wrong_number_of_targets_is_an_error(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["trace", *arguments])
    assert message in capsys.readouterr().err


def test_observation_for_a_checkpoint_without_robot_is_an_error(golden, tmp_path):
    def run(name):
        run_trace([str(golden.checkpoint)], Shapes(), Source(tmp_path / name))

    np.savez(tmp_path / "x.npz", state=np.zeros(3), prompt="go")
    with pytest.raises(ValueError, match="checkpoint that does not state its robot"):
        run("x.npz")
    with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
        run("missing.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(ValueError, match="damaged"):
        run("bad.npz")
    np.savez(tmp_path / "batch.npz", tokenized_prompt=np.zeros((1, 4), np.int64))
    with pytest.raises(ValueError, match="has no state, tokenized_prompt_mask"):
        run("batch.npz")


def test_inputs_of_a_preset_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="is a preset, traced without weights"):
        run_trace(["pi05"], Shapes(), Source(dataset="some/set"))
    with pytest.raises(ValueError, match="not from both"):
        Source(tmp_path / "x.npz", "some/set")


def test_entries_are_json():
    entry = TraceEntry("5", "x_t", (1, 2), "float32")
    assert entry.to_json() == {
        "step": "5", "name": "x_t", "shape": [1, 2], "dtype": "float32", "view": "both", "phase": "both",
    }  # fmt: skip


def test_policy_options_are_refused_for_a_preset(capsys):
    with pytest.raises(SystemExit):
        main(["trace", "tiny_pi0", "--embodiment", "aloha", "--default-prompt", "wave"])
    error = capsys.readouterr().err
    assert "traced without weights; --embodiment, --default-prompt would have no effect" in error
