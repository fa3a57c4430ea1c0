"""The steps from a robot's observation to the loss and the actions, with their formulas."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the forward pass."""

    id: str
    title: str
    pi05: str
    """One line of explanation, for π₀.₅."""
    pi0: str = ""
    """For π₀, where it differs."""

    def explanation(self, pi05: bool) -> str:
        """One line for a variant."""
        return self.pi05 if pi05 or not self.pi0 else self.pi0


STEPS = (
    Step("0", "Observation of the robot", "Cameras, state and words become images, normalized numbers and token ids."),
    Step(
        "1",
        "Observation of the model",
        "Images become floats. The state is in the prompt's text; the network does not read it here.",
        "Images become floats. The state stays a vector; it will be a token of the suffix.",
    ),
    Step("2", "SigLIP", "Images are cut into patches; a vision transformer makes them tokens of the backbone's width."),
    Step("3", "Embedder", "Each token id picks a row of the table, which is multiplied by the root of its width."),
    Step("4", "Prefix", "Images, then text, in one sequence. One group: all tokens attend to each other but padding."),
    Step(
        "5",
        "Flow matching and suffix",
        "x_t, between noise and actions, becomes one token per action; the time becomes adarms_cond.",
        "x_t, between noise and actions, becomes one token per action; the time is mixed into each.",
    ),
    Step("6", "Attention mask and positions", "The prefix never attends to the suffix, so it can be computed once."),
    Step(
        "7-1",
        "Layer 0 · norm",
        "Backbone: a learned scale. Expert: scale, shift and the residual's gate come from adarms_cond.",
        "Both experts: a learned scale.",
    ),
    Step(
        "7-2",
        "Layer 0 · queries, keys, values",
        "Each expert has its own matrices; the heads have the same size in both, so that they can meet.",
    ),
    Step("7-3", "Layer 0 · rotary positions", "Queries and keys are rotated by their token's position, in float32."),
    Step(
        "7-4",
        "Layer 0 · attention",
        "Joint: one square of logits. The model itself computes only the two blocks that are read.",
    ),
    Step("7-5", "Layer 0 · output projection", "Back to each expert's own width."),
    Step(
        "7-6",
        "Layer 0 · residual",
        "Backbone: plain. Expert: times the gate; where it is 0, the layer does nothing.",
        "Plain in both experts.",
    ),
    Step(
        "7-7",
        "Layer 0 · feed-forward",
        "The second norm with its own modulation, GeGLU, and the second residual.",
        "The second norm, GeGLU, and the second residual.",
    ),
    Step("8", "All layers", "Of the prefix, inference keeps keys and values; nothing else of it is read later."),
    Step(
        "9",
        "Final norms",
        "The expert's is modulated too, without its gate. The prefix's is in the joint view only.",
        "One per expert. The prefix's output is in the joint view only.",
    ),
    Step("10", "Velocity", "The action tokens are projected to the velocity, the direction from actions to noise."),
    Step("11", "Loss", "One number per action of the chunk: the mean over the action dimensions."),
    Step("inference", "Denoising", "One prefill; then Euler steps from noise (t = 1) to actions, of the expert only."),
)

_FORMULAS = {
    "0 embodiment/image": "to_uint8_hwc(robot's image)",
    "0 embodiment/state": "parts joined, in the model's units",
    "0 embodiment/prompt": "robot/prompt, or the default",
    "0 prompt_text": "prompt format of the policy",
    "0 normalized_state": "normalize(embodiment/state)",
    "0 token_ids": "tokenizer(prompt_text)",
    "0 image": "resize_with_pad(image)",
    "0 image_mask": "True: the robot has the camera",
    "0 state": "pad(normalized_state)",
    "0 tokenized_prompt": "pad(token_ids)",
    "0 actions": "normalize(actions − state), padded",
    "1 image": "image / 255 · 2 − 1",
    "2 patches": "patch × patch pixels of RGB",
    "2 patch_embedding": "patches · W + b",
    "2 with_position_embedding": "+ position",
    "2 layer_#/q": "norm(x) · Wq + b",
    "2 layer_#/k": "norm(x) · Wk + b",
    "2 layer_#/v": "norm(x) · Wv + b",
    "2 layer_#/mlp_hidden": "norm(x) · W1 + b",
    "2 layer_#/out": "x + mlp(x + attention(x))",
    "2 final_norm": "layer_norm(x)",
    "2 image_tokens": "x · W + b",
    "3 text_tokens": "table[id] · √D",
    "4 image_mask": "image_mask, for each patch",
    "4 image_tokens": "concat(cameras)",
    "4 prefix_tokens": "concat(image_tokens, text_tokens)",
    "4 prefix_mask": "True: no padding",
    "4 prefix_ar_mask": "True: begins a group",
    "5 noise": "N(0, 1)",
    "5 time": "Beta(1.5, 1) · 0.999 + 0.001",
    "5 x_t": "t · noise + (1 − t) · actions",
    "5 u_t": "noise − actions",
    "5 sinusoid_input": "2π · t / period, 4e-3 … 4",
    "5 posemb_sincos": "concat(sin, cos)",
    "5 action_in_proj": "x_t · W + b",
    "5 time_mlp_in": "posemb_sincos · W + b",
    "5 time_mlp_out": "silu(time_mlp_in) · W + b",
    "5 adarms_cond": "silu(time_mlp_out)",
    "5 state_proj": "state · W + b",
    "5 action_and_time": "concat(action, posemb_sincos)",
    "5 action_time_mlp_in": "action_and_time · W + b",
    "5 action_time_mlp_out": "silu(action_time_mlp_in) · W + b",
    "5 suffix_tokens": "action_in_proj",
    "6 attn_mask": "group[key] ≤ group[query], no padding",
    "6 positions": "cumsum(valid) − 1",
    "7-2 q": "normed · Wq",
    "7-2 k": "normed · Wk",
    "7-2 v": "normed · Wv",
    "7-3 q": "rotate(q, position) / √K",
    "7-3 k": "rotate(k, position)",
    "7-3 v": "as in 7-2",
    "7-4 q_grouped": "Q/G queries per key/value head",
    "7-4 logits": "q · kᵀ",
    "7-4 probs": "softmax(logits where mask)",
    "7-4 attn_out": "probs · v",
    "7-5 attn_proj": "attn_out · Wo",
    "8 layer_#": "x_out",
    "8 cache/layer_#/k": "k of the prefix, rotated",
    "8 cache/layer_#/v": "v of the prefix",
    "8 modulation": "adarms_cond · W + b",
    "9 modulation": "adarms_cond · W + b",
    "9 prefix_out": "norm(x)",
    "9 suffix_out": "norm(x)",
    "10 action_out": "suffix_out[:, −H:]",
    "10 v_t": "action_out · W + b",
    "11 loss": "mean((v_t − u_t)²)",
    "inference cache": "one prefill",
    "inference attn_mask": "last T rows of the mask",
    "inference positions": "last T positions",
    "inference noise": "x_t at t = 1",
    "inference suffix_tokens": "as in step 5",
    "inference adarms_cond": "as in step 5",
    "inference v_t": "expert(x_t, t, cache)",
    "inference x_t": "x_t − v_t / num_steps",
    "inference action_chunk": "x_t at t = 0",
    "inference robot_actions": "unnormalize, + state, robot's units",
}
_NORM_FORMULAS = {
    "variance": "mean(x²)",
    "normed": "x / √(variance + ε) · (1 + scale)",
    "scale": "1st third of modulation",
    "shift": "2nd third of modulation",
    "gate": "3rd third of modulation",
    "ffw_gate_up": "normed · [Wg, Wu]",
    "ffw_hidden": "gelu(gate) · up",
    "ffw_out": "ffw_hidden · Wd",
}


def formula_of(step: str, name: str, *, pi05: bool) -> str:
    """The formula of a tensor; "": it is an input.

    Args:
        name: its parts are separated by "/"; "prefix/" or "suffix/" in front do not matter, nor cameras and numbers.
    """
    side, _, rest = name.partition("/")
    part = rest if side in ("prefix", "suffix") else name
    adaptive = pi05 and side == "suffix"
    if part in _NORM_FORMULAS and step in ("7-1", "7-7", "9"):
        return _NORM_FORMULAS[part] + (" + shift" if adaptive and part == "normed" else "")
    if step in ("7-6", "7-7") and part in ("x", "x_out"):
        added = "attn_proj" if part == "x" else "ffw_out"
        return f"x + {added} · gate" if adaptive else f"x + {added}"
    if name == "suffix_tokens" and not pi05:
        return "concat(state_proj, action_time_mlp_out)"
    key = re.sub(r"(layer_)\d+", r"\1#", f"{step} {part}")
    while key not in _FORMULAS and "/" in key:
        key = key.rpartition("/")[0]
    return _FORMULAS.get(key, "")
