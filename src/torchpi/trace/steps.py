"""The steps of the way, in order, with one line of explanation each."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the way from a robot's observation to an action chunk."""

    id: str
    title: str
    pi05: str
    """One line of explanation, for π₀.₅."""
    pi0: str | None = None
    """For π₀, where it differs."""
    formula: str = ""
    """What is computed."""
    formula_pi0: str | None = None
    """For π₀, where it differs."""

    def explanation(self, pi05: bool) -> str:
        """One line for a variant."""
        return self.pi05 if pi05 or self.pi0 is None else self.pi0

    def formula_of(self, pi05: bool) -> str:
        """The formula for a variant; may be empty."""
        return self.formula if pi05 or self.formula_pi0 is None else self.formula_pi0


STEPS = (
    Step("0", "Raw input", "Camera images as bytes, the prompt as token ids; in training also the recorded actions."),
    Step(
        "1",
        "Observation",
        "Images become floats. The state is in the prompt's text; the network does not read it here.",
        "Images become floats. The state stays a vector; it will be a token of the suffix.",
        formula="image / 255 · 2 − 1",
    ),
    Step(
        "2",
        "SigLIP",
        "Images are cut into patches; a vision transformer makes them tokens of the backbone's width.",
        formula="head(norm(blocks(patches · W + b + position)))",
    ),
    Step(
        "3",
        "Embedder",
        "Each token id picks a row of the table, which is multiplied by the root of its width.",
        formula="table[id] · √D",
    ),
    Step(
        "4",
        "Prefix",
        "Images, then text, in one sequence. One group: every token sees every other, padding aside.",
        formula="concat(image tokens, text tokens)",
    ),
    Step(
        "5",
        "Flow matching and suffix",
        "x_t, between noise and actions, becomes one token per action; the time becomes adarms_cond.",
        "x_t, between noise and actions, becomes one token per action; the time is mixed into each.",
        formula="x_t = t · noise + (1 − t) · actions      u_t = noise − actions",
    ),
    Step(
        "6",
        "Mask and positions",
        "The prefix never sees the suffix, so it can be computed once. Padding takes no position.",
        formula="mask = cumsum(ar)[key] ≤ cumsum(ar)[query] and both real      position = cumsum(real) − 1",
    ),
    Step(
        "7-1",
        "Layer 0 · norm",
        "Backbone: a learned scale. Expert: scale, shift and the residual's gate come from adarms_cond.",
        "Both experts: a learned scale.",
        formula="x / rms(x) · (1 + scale)      expert: + shift",
        formula_pi0="x / rms(x) · (1 + scale)",
    ),
    Step(
        "7-2",
        "Layer 0 · queries, keys, values",
        "Each expert has its own matrix; the heads have the same size in both, so that they can meet.",
        formula="x · Wqkv",
    ),
    Step(
        "7-3",
        "Layer 0 · rotary positions",
        "Queries and keys are rotated by their token's position, in float32.",
        formula="q ← rotate(q, position) / √K      k ← rotate(k, position)",
    ),
    Step(
        "7-4",
        "Layer 0 · attention",
        "Joint: one square of logits. The model itself computes only the two blocks that are read.",
        formula="softmax(q · kᵀ, masked) · v",
    ),
    Step(
        "7-5",
        "Layer 0 · output projection",
        "What the heads found goes back to each expert's own width.",
        formula="attn_out · Wo",
    ),
    Step(
        "7-6",
        "Layer 0 · residual",
        "Backbone: plain. Expert: times the gate; where it is 0, the layer does nothing.",
        "Plain in both experts.",
        formula="x ← x + y      expert: x ← x + y · gate",
        formula_pi0="x ← x + y",
    ),
    Step(
        "7-7",
        "Layer 0 · feed-forward",
        "The second norm with its own modulation, GeGLU, and the second residual.",
        "The second norm, GeGLU, and the second residual.",
        formula="x ← x + (gelu(y · Wg) ∘ (y · Wu)) · Wd      expert: · gate",
        formula_pi0="x ← x + (gelu(y · Wg) ∘ (y · Wu)) · Wd",
    ),
    Step(
        "8",
        "All layers",
        "Of the prefix, the model keeps keys and values; behind the last ones it needs nothing of it.",
    ),
    Step(
        "9",
        "Final norms",
        "The expert's is modulated too, without its gate. The prefix's is in the joint view only.",
        "One per expert. The prefix's output is in the joint view only.",
    ),
    Step(
        "10",
        "Velocity",
        "The action tokens are projected to the velocity, the direction from actions to noise.",
        formula="v_t = suffix_out[:, −H:] · W + b",
    ),
    Step(
        "11",
        "Loss",
        "One number per action of the chunk: the mean over the action dimensions.",
        formula="loss = mean((v_t − u_t)²)",
    ),
    Step(
        "inference",
        "Inference",
        "One prefill; then Euler steps from noise (t = 1) to actions, which run the expert only.",
        formula="x ← x + dt · v_t",
    ),
)
