"""π₀.₅ in one file: from camera images and a prompt to a robot's next actions, and to the training loss.

    python examples/nanopi.py [CHECKPOINT] [--config X.json] [--inputs X.npz --out Y.npz]

The code follows the order of the computation, steps 0 to 11 and then inference, with shapes as trailing comments. It
covers π₀ too, which differs in step 5 (how state and time enter) and in step 7-1 (the norms of the action expert).

Functions take the weights by name, `w`, and `show(step, name, tensor)`, which prints a shape and returns the tensor.
The code is written for reading, not for speed. Both experts run side by side, as in the papers' figures: one sequence,
one attention mask, explicit logits. `torchpi.model` computes the same numbers with a KV cache instead of the joint
sequence; a test checks that they agree.

    B  batch                        S  prefix tokens, 968 = 3·256 + 200       D  backbone width, 2048
    P  patches per image, 256       T  suffix tokens, 50                      d  action expert width, 1024
    L  prompt tokens, 200           J  all tokens, S + T = 1018               Q  query heads, 8
    H  actions in a chunk, 50       W  SigLIP's width, 1152                   G  key/value heads, 1
    A  action dimensions, 32        F  feed-forward width, 16384 and 4096     K  head width, 256

Papers: π₀ (arXiv:2410.24164), π₀.₅ (arXiv:2504.16054), PaliGemma (arXiv:2407.07726), SigLIP (arXiv:2303.15343).
Time runs from t = 1 (noise) to t = 0 (actions), as in the published weights; the papers use the opposite convention.
"""

import argparse
import math

import numpy as np
import torch
from torch.nn import functional as F

STACKS = {"prefix": "backbone", "suffix": "expert"}  # images and prompt: Gemma-2B; actions: Gemma-300M
MASKED_LOGIT = -2.3819763e38  # like −∞, but a fully masked row stays finite


def print_shape(step, name, tensor, layer=None):
    """Print name, shape and dtype of a tensor; of the layers, which are alike, only the first."""
    if not layer:
        print(f"{step:>9}  {name:<38} {list(tensor.shape)!s:<24} {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


def silent(step, name, tensor, layer=None):
    """Do nothing: a `show` that prints nothing."""
    return tensor


def linear(w, name, x):
    """x · Wᵀ + b in the dtype of x."""
    bias = w[f"{name}.bias"].to(x.dtype) if f"{name}.bias" in w else None  # [out]
    return F.linear(x, w[f"{name}.weight"].to(x.dtype), bias)  # [..., out]


def layer_norm(w, name, x):
    """LayerNorm in float32: zero mean and unit variance, then a learned scale and shift."""
    normed = F.layer_norm(x.float(), x.shape[-1:], w[f"{name}.weight"].float(), w[f"{name}.bias"].float(), 1e-6)
    return normed.to(x.dtype)  # [B, P, W]


# ---- steps 0 and 1: the observation ----


def observe(inputs, show):
    """Steps 0 and 1: convert uint8 images to floats in [-1, 1]."""
    for name, tensor in inputs.items():
        if not name.startswith(("noise", "time")):  # shown in step 5
            show("0", name.replace(".", "/"), tensor)
    images = {}
    for camera in [name.removeprefix("image.") for name in inputs if name.startswith("image.")]:
        image = inputs[f"image.{camera}"]  # [B, 224, 224, 3]
        image = image.float() / 255 * 2 - 1 if image.dtype is torch.uint8 else image  # [B, 224, 224, 3]
        images[camera] = show("1", f"image/{camera}", image)  # [B, 224, 224, 3]
    show("1", "state", inputs["state"].float())  # [B, A]
    return images


# ---- steps 2 to 4: the prefix ----


def siglip(w, config, camera, image, show):
    """Step 2: encode one camera's image with a vision transformer as tokens of the backbone's width."""
    vit, dtype = config.siglip, w["embedding"].dtype
    side = image.shape[1] // vit.patch  # 16
    grid = image.unflatten(1, (side, vit.patch)).unflatten(3, (side, vit.patch))  # [B, 16, 14, 16, 14, 3]
    patches = show("2", f"patches/{camera}", grid.transpose(2, 3).flatten(1, 2).flatten(2))  # [B, P, 14·14·3]
    x = show("2", f"patch_embedding/{camera}", linear(w, "vision.patch_embed", patches))  # [B, P, W]
    x = show("2", f"with_position_embedding/{camera}", x + w["vision.pos_embed"].float()).to(dtype)  # [B, P, W]
    for i in range(vit.depth):
        block = f"vision.blocks.{i}"
        qkv = linear(w, f"{block}.qkv", layer_norm(w, f"{block}.norm1", x))  # [B, P, 3·W]
        q, k, v = qkv.unflatten(-1, (3, vit.num_heads, -1)).unbind(2)  # 3 × [B, P, 16, 72]
        for name, part in (("q", q), ("k", k), ("v", v)):
            show("2", f"layer_{i}/{name}/{camera}", part, i)  # [B, P, 16, 72]
        logits = torch.einsum("bqhk,bphk->bhqp", q.float() * q.shape[-1] ** -0.5, k.float())  # [B, 16, P, P]
        attended = torch.einsum("bhqp,bphk->bqhk", logits.softmax(-1).to(v.dtype), v)  # [B, P, 16, 72]
        x = x + linear(w, f"{block}.out", attended.flatten(2))  # [B, P, W]
        hidden = linear(w, f"{block}.fc1", layer_norm(w, f"{block}.norm2", x))  # [B, P, 4304]
        show("2", f"layer_{i}/mlp_hidden/{camera}", hidden, i)  # [B, P, 4304]
        x = x + linear(w, f"{block}.fc2", F.gelu(hidden, approximate="tanh"))  # [B, P, W]
        show("2", f"layer_{i}/out/{camera}", x, i)  # [B, P, W]
    x = show("2", f"final_norm/{camera}", layer_norm(w, "vision.norm", x))  # [B, P, W]
    return show("2", f"image_tokens/{camera}", linear(w, "vision.head", x))  # [B, P, D]


def embed_text(w, ids, show):
    """Step 3: look up token embeddings and multiply them by √D."""
    table = show("3", "embedding_table", w["embedding"])  # [257152, D]
    scale = torch.tensor(table.shape[1] ** 0.5, dtype=table.dtype)  # first rounded to the dtype of the weights
    return show("3", "text_tokens", table[ids] * scale)  # [B, L, D]


def embed_prefix(w, config, inputs, show):
    """Steps 0 to 4: join image and text tokens to a sequence with bidirectional attention, padding excluded."""
    tokens, masks = [], []
    for camera, image in observe(inputs, show).items():
        tokens.append(siglip(w, config, camera, image, show))  # [B, P, D]
        present = inputs.get(f"image_mask.{camera}", torch.ones_like(image[:, 0, 0, 0], dtype=torch.bool))  # [B]
        masks.append(show("4", f"image_mask/{camera}", present[:, None].expand(-1, tokens[-1].shape[1])))  # [B, P]
    text = embed_text(w, inputs["tokenized_prompt"].long(), show)  # [B, L, D]
    image_tokens = show("4", "image_tokens", torch.cat(tokens, dim=1))  # [B, 3·P, D]
    prefix = show("4", "prefix_tokens", torch.cat([image_tokens, text], dim=1))  # [B, S, D]
    mask = show("4", "prefix_mask", torch.cat([*masks, inputs["tokenized_prompt_mask"]], dim=1))  # [B, S]
    ar_mask = show("4", "prefix_ar_mask", torch.zeros_like(mask[0]))  # [S], one group
    return prefix, mask, ar_mask


# ---- step 5: flow matching and the suffix ----


def posemb_sincos(t, width, show):
    """Sines and cosines of the time at periods from 4e-3 to 4, with openpi's float32 operations in the same order."""
    half = width // 2  # 512
    fraction = np.arange(half, dtype=np.float32) * np.float32(1 / max(half - 1, 1))  # [512]
    fraction[-1] = 1 if half > 1 else 0
    period = np.float32(4e-3) * np.power(4.0 / 4e-3, fraction.astype(np.float64)).astype(np.float32)  # [512]
    frequency = torch.from_numpy(np.float32(1) / period * np.float32(2) * np.float32(math.pi))  # [512]
    angle = show("5", "sinusoid_input", t.float()[:, None] * frequency.to(t.device))  # [B, 512]
    return show("5", "posemb_sincos", torch.cat([angle.sin(), angle.cos()], dim=-1))  # [B, d]


def embed_suffix(w, config, state, x_t, t, show):
    """Step 5: embed the noisy actions, one token each. The time conditions the norms (π₀.₅) or the tokens (π₀)."""
    time = posemb_sincos(t, config.action_expert.width, show)  # [B, d]
    actions = show("5", "action_in_proj", linear(w, "suffix.action_in_proj", x_t))  # [B, H, d]
    new_group = torch.zeros(x_t.shape[1], dtype=torch.bool, device=x_t.device)  # [H]
    new_group[0] = True  # the prefix does not attend to the actions; they attend to each other
    if config.pi05:
        hidden = show("5", "time_mlp_in", linear(w, "suffix.time_mlp_in", time))  # [B, d]
        hidden = show("5", "time_mlp_out", linear(w, "suffix.time_mlp_out", F.silu(hidden)))  # [B, d]
        cond = show("5", "adarms_cond", F.silu(hidden))  # [B, d]
        tokens, ar_mask = actions, new_group  # [B, H, d], [H]
    else:
        state_token = show("5", "state_proj", linear(w, "suffix.state_proj", state.float()))  # [B, d]
        both = torch.cat([actions, time[:, None].expand_as(actions)], dim=-1)  # [B, H, 2·d]
        both = show("5", "action_and_time", both)  # [B, H, 2·d]
        hidden = show("5", "action_time_mlp_in", linear(w, "suffix.action_time_mlp_in", both))  # [B, H, d]
        mixed = show("5", "action_time_mlp_out", linear(w, "suffix.action_time_mlp_out", F.silu(hidden)))  # [B, H, d]
        tokens = torch.cat([state_token[:, None], mixed], dim=1)  # [B, 1 + H, d]
        ar_mask = torch.cat([torch.ones_like(new_group[:1]), new_group])  # [1 + H]: the state is a group of its own
        cond = None  # the time is mixed into the tokens
    tokens = show("5", "suffix_tokens", tokens)  # [B, T, d]
    mask = show("5", "suffix_mask", torch.ones_like(tokens[..., 0], dtype=torch.bool))  # [B, T]
    return tokens, mask, show("5", "suffix_ar_mask", ar_mask), cond


# ---- step 6: attention mask and positions ----


def make_attn_mask(input_mask, ar_mask):
    """Block-causal mask: a token attends to its own group and to those before it; padding is excluded."""
    group = ar_mask.cumsum(0)  # [J], True begins a new group
    in_order = group[None, :] <= group[:, None]  # [J, J]: row = query, column = key
    return in_order & input_mask[:, None, :] & input_mask[:, :, None]  # [B, J, J]


def token_positions(input_mask):
    """Number the valid tokens, so that padding shifts no position."""
    return input_mask.cumsum(1) - 1  # [B, J]


# ---- steps 7 to 9: the transformer ----


def rms_norm(w, name, x, cond, step, part, layer, show):
    """Step 7-1: x / rms(x), with a learned scale, or with scale, shift and gate computed from the time (AdaRMSNorm)."""
    variance = show(step, f"{part}/variance", x.float().square().mean(-1, keepdim=True), layer)  # [B, S, 1]
    normed = x.float() * torch.rsqrt(variance + 1e-6)  # [B, S, D]
    if f"{name}.scale" in w:
        out, gate = normed * (1 + w[f"{name}.scale"].float()), None  # [B, S, D]
    else:
        norm = name.removeprefix("expert.").replace("layers.", "layer_").replace(".", "/")  # layer_0/pre_ffw_norm
        modulation = linear(w, f"{name}.dense", cond.to(x.dtype))  # [B, 3·d]
        show("9" if step == "9" else "8", f"modulation/{norm}", modulation, layer)  # listed with all layers in step 8
        scale, shift, gate = modulation[:, None].chunk(3, dim=-1)  # 3 × [B, 1, d]
        for parameter, value in (("scale", scale), ("shift", shift), ("gate", gate)):
            show(step, f"{part}/{parameter}", value, layer)  # [B, 1, d]
        out = normed * (1 + scale.float()) + shift.float()  # [B, T, d]
    return show(step, f"{part}/normed", out.to(x.dtype), layer), gate


def apply_rope(x, positions):
    """Step 7-3: rotate each pair (i, i + K/2) by an angle that grows with the position; in float32."""
    half = x.shape[-1] // 2  # K/2
    period = 10_000 ** (torch.arange(half, dtype=torch.float32, device=x.device) * (2 / x.shape[-1]))  # [K/2]
    angle = (positions[..., None].float() / period)[:, :, None]  # [B, J, 1, K/2]
    first, second = x.float().chunk(2, dim=-1)  # 2 × [B, J, heads, K/2]
    rotated = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.cat(rotated, dim=-1).to(x.dtype)  # [B, J, heads, K]


def attention(q, k, v, mask, layer, show):
    """Step 7-4: grouped-query attention; the Q/G query heads of a group share its keys and values."""
    grouped = show("7-4", "q_grouped", q.unflatten(2, (k.shape[2], -1)), layer)  # [B, J, G, Q/G, K]
    logits = torch.einsum("bjghk,bcgk->bghjc", grouped.float(), k.float())  # [B, G, Q/G, J, J]
    logits = show("7-4", "logits", logits, layer).masked_fill(~mask[:, None, None], MASKED_LOGIT)  # [B, G, Q/G, J, J]
    probs = show("7-4", "probs", logits.softmax(dim=-1), layer)  # [B, G, Q/G, J, J]
    out = torch.einsum("bghjc,bcgk->bjghk", probs.to(v.dtype), v)  # [B, J, G, Q/G, K]
    return show("7-4", "attn_out", out.flatten(2), layer)  # [B, J, Q·K]


def transformer_layer(w, config, i, streams, positions, mask, cond, past, show):
    """Steps 7-1 to 7-7: both experts, each with its own weights, share one attention.

    `streams` holds the tokens of "prefix", "suffix" or both; `past` holds cached keys and values that precede them.
    """
    heads, width = config.paligemma.num_heads, config.paligemma.head_dim  # Q, K: the same in both experts
    groups = config.paligemma.num_kv_heads  # G
    queries, keys, values, gates = [], [], [], {}
    for part, x in streams.items():
        block = f"{STACKS[part]}.layers.{i}"
        show("7-1", f"{part}/x", x, i)  # [B, S, D] or [B, T, d]
        y, gates[part] = rms_norm(w, f"{block}.pre_attention_norm", x, cond, "7-1", part, i, show)  # [B, S, D]
        qkv = linear(w, f"{block}.attention.qkv", y).unflatten(-1, (-1, width))  # [B, S, Q + 2·G, K]
        q, k, v = qkv.split([heads, groups, groups], dim=2)  # [B, S, Q, K] and 2 × [B, S, G, K]
        queries.append(show("7-2", f"{part}/q", q, i))  # [B, S, Q, K]
        keys.append(show("7-2", f"{part}/k", k, i))  # [B, S, G, K]
        values.append(show("7-2", f"{part}/v", v, i))  # [B, S, G, K]
    q = show("7-3", "q", apply_rope(torch.cat(queries, dim=1), positions) * width**-0.5, i)  # [B, J, Q, K]
    k = show("7-3", "k", apply_rope(torch.cat(keys, dim=1), positions), i)  # [B, J, G, K]
    v = show("7-3", "v", torch.cat(values, dim=1), i)  # [B, J, G, K]
    past_k, past_v = past or (k[:, :0], v[:, :0])  # [B, S, G, K]: the cache, or empty
    out = attention(q, torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1), mask, i, show)  # [B, J, Q·K]
    outputs = {}
    per_stream = out.split([x.shape[1] for x in streams.values()], dim=1)  # [B, S, Q·K] and [B, T, Q·K]
    for (part, x), attended in zip(streams.items(), per_stream, strict=True):
        block = f"{STACKS[part]}.layers.{i}"
        y = linear(w, f"{block}.attention.out", show("7-4", f"{part}/attn_out", attended, i))  # [B, S, D]
        y = show("7-5", f"{part}/attn_proj", y, i)  # [B, S, D]
        x = show("7-6", f"{part}/x", x + y if gates[part] is None else x + y * gates[part], i)  # [B, S, D]
        y, gate = rms_norm(w, f"{block}.pre_ffw_norm", x, cond, "7-7", part, i, show)  # [B, S, D]
        hidden = show("7-7", f"{part}/ffw_gate_up", linear(w, f"{block}.feed_forward.gate_up", y), i)  # [B, S, 2·F]
        hidden, up = hidden.chunk(2, dim=-1)  # 2 × [B, S, F]
        hidden = show("7-7", f"{part}/ffw_hidden", F.gelu(hidden, approximate="tanh") * up, i)  # [B, S, F]
        y = show("7-7", f"{part}/ffw_out", linear(w, f"{block}.feed_forward.down", hidden), i)  # [B, S, D]
        outputs[part] = show("7-7", f"{part}/x_out", x + y if gate is None else x + y * gate, i)  # [B, S, D]
        show("8", f"{part}/layer_{i}", outputs[part], i)  # [B, S, D]
    return outputs, (k, v)


def transformer(w, config, streams, positions, mask, cond, past, show):
    """Steps 7 to 9: all layers, then the final norms; also returns the keys and values of each layer."""
    cache = []
    for i in range(config.paligemma.depth):
        layer_past = None if past is None else past[i]  # 2 × [B, S, G, K]
        streams, keys_values = transformer_layer(w, config, i, streams, positions, mask, cond, layer_past, show)
        cache.append(keys_values)  # 2 × [B, J, G, K]
    outputs = {}
    for part, x in streams.items():
        outputs[part], _ = rms_norm(w, f"{STACKS[part]}.final_norm", x, cond, "9", part, None, show)  # [B, S, D]
    return outputs, cache


# ---- steps 5 to 11: training ----


def velocity(w, x, horizon, show):
    """Step 10: project the action tokens to v_t, the velocity from actions to noise."""
    action_out = show("10", "action_out", x[:, -horizon:].float())  # [B, H, d]
    return show("10", "v_t", linear(w, "action_out_proj", action_out))  # [B, H, A]


def training_loss(w, config, prefix, inputs, show):
    """Steps 5 to 11: predict the velocity from actions to noise at a random point between the two."""
    prefix_tokens, prefix_mask, prefix_ar_mask = prefix  # [B, S, D], [B, S], [S]
    actions, noise, t = inputs["actions"], show("5", "noise", inputs["noise"]), show("5", "time", inputs["time"])
    x_t = show("5", "x_t", t[:, None, None] * noise + (1 - t[:, None, None]) * actions)  # [B, H, A]
    u_t = show("5", "u_t", noise - actions)  # [B, H, A]
    suffix_tokens, suffix_mask, suffix_ar_mask, cond = embed_suffix(w, config, inputs["state"], x_t, t, show)
    input_mask = torch.cat([prefix_mask, suffix_mask], dim=1)  # [B, J]
    ar_mask = torch.cat([prefix_ar_mask, suffix_ar_mask])  # [J]
    mask = show("6", "attn_mask", make_attn_mask(input_mask, ar_mask))  # [B, J, J]
    positions = show("6", "positions", token_positions(input_mask))  # [B, J]
    streams = {"prefix": prefix_tokens, "suffix": suffix_tokens.to(prefix_tokens.dtype)}  # [B, S, D], [B, T, d]
    outputs, keys_values = transformer(w, config, streams, positions, mask, cond, None, show)
    for i, (k, v) in enumerate(keys_values):  # inference keeps only these of the prefix
        show("8", f"cache/layer_{i}/k", k[:, : prefix_mask.shape[1]], i)  # [B, S, G, K]
        show("8", f"cache/layer_{i}/v", v[:, : prefix_mask.shape[1]], i)  # [B, S, G, K]
    show("9", "prefix_out", outputs["prefix"])  # [B, S, D], unused
    v_t = velocity(w, show("9", "suffix_out", outputs["suffix"]), actions.shape[1], show)  # [B, H, A]
    return show("11", "loss", (v_t - u_t).square().mean(dim=-1))  # [B, H]


# ---- inference ----


def sample_actions(w, config, prefix, state, noise, show, num_steps=10):
    """Inference: run the prefix once, keep its keys and values, then take Euler steps from noise to actions."""
    prefix_tokens, prefix_mask, prefix_ar_mask = prefix  # [B, S, D], [B, S], [S]
    mask, positions = make_attn_mask(prefix_mask, prefix_ar_mask), token_positions(prefix_mask)  # [B, S, S], [B, S]
    _, cache = transformer(w, config, {"prefix": prefix_tokens}, positions, mask, None, None, silent)
    show("inference", "prefix_tokens", prefix_tokens)  # [B, S, D]
    for i, (k, v) in enumerate(cache):
        show("inference", f"cache/layer_{i}/k", k, i)  # [B, S, G, K]
        show("inference", f"cache/layer_{i}/v", v, i)  # [B, S, G, K]
    x_t, t, dt = show("inference", "noise", noise), np.float32(1), np.float32(-1 / num_steps)  # [B, H, A]
    while t >= -dt / 2:  # 1.0, 0.9 … 0.1, in float32 as in openpi
        label = f"t={float(t):.3g}"
        time = show("inference", f"time/{label}", torch.full_like(noise[:, 0, 0], float(t)))  # [B]
        show("inference", f"x_t/{label}", x_t)  # [B, H, A]
        suffix_tokens, suffix_mask, suffix_ar_mask, cond = embed_suffix(w, config, state, x_t, time, silent)
        input_mask = torch.cat([prefix_mask, suffix_mask], dim=1)  # [B, J]
        mask = make_attn_mask(input_mask, torch.cat([prefix_ar_mask, suffix_ar_mask]))[:, prefix_mask.shape[1] :]
        positions = token_positions(input_mask)[:, prefix_mask.shape[1] :]  # [B, T]
        if t == 1:
            show("inference", "attn_mask", mask)  # [B, T, J]
            show("inference", "positions", positions)  # [B, T]
            show("inference", "suffix_tokens", suffix_tokens)  # [B, T, d]
            if cond is not None:
                show("inference", "adarms_cond", cond)  # [B, d]
        stream = {"suffix": suffix_tokens.to(prefix_tokens.dtype)}  # [B, T, d]
        outputs, _ = transformer(w, config, stream, positions, mask, cond, cache, silent)
        v_t = show("inference", f"v_t/{label}", velocity(w, outputs["suffix"], noise.shape[1], silent))  # [B, H, A]
        x_t, t = x_t + float(dt) * v_t, t + dt  # [B, H, A]
    return show("inference", "action_chunk", x_t)  # [B, H, A]


# ---- the command ----


def weights_of(model):
    """The weights by name, including a fixed position embedding, which is not a parameter."""
    return {**dict(model.named_parameters()), "vision.pos_embed": model.vision.position_embedding()}


def random_inputs(config, batch=2):
    """Draw random images, prompt, state, actions, noise and time."""
    rng, size, length = np.random.default_rng(0), config.image_size, config.require("max_token_len")
    horizon, dim = config.require("action_horizon"), config.action_dim
    cameras = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"
    inputs = {f"image.{name}": rng.integers(0, 256, (batch, size, size, 3), np.uint8) for name in cameras}
    inputs |= {f"image_mask.{name}": np.ones(batch, bool) for name in cameras}
    inputs["state"] = rng.uniform(-1, 1, (batch, dim)).astype(np.float32)
    inputs["tokenized_prompt"] = rng.integers(0, config.vocab_size, (batch, length))
    inputs["tokenized_prompt_mask"] = np.ones((batch, length), bool)
    inputs["actions"] = rng.uniform(-1, 1, (batch, horizon, dim)).astype(np.float32)
    inputs["noise"] = rng.standard_normal((batch, horizon, dim)).astype(np.float32)
    inputs["time"] = (rng.beta(1.5, 1, batch) * 0.999 + 0.001).astype(np.float32)  # more weight near the noise
    return inputs


def main():
    """Run the training forward pass and inference on one batch, and print every shape."""
    parser = argparse.ArgumentParser(description="π₀.₅ and π₀ in one file, with the shape of every tensor.")
    parser.add_argument("checkpoint", nargs="?", default="demo", help="path for torchpi.load_model; default: demo")
    parser.add_argument("--config", help="preset or JSON file, for checkpoints that do not state their sizes")
    parser.add_argument("--inputs", help=".npz file with image.*, state, tokenized_prompt, actions, noise, time, …")
    parser.add_argument("--out", help=".npz file for the results: loss [B, H] and actions [B, H, A]")
    args = parser.parse_args()

    import torchpi  # only to load the weights

    try:
        model = torchpi.load_model(args.checkpoint, config=args.config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    w, config = weights_of(model), model.config
    arrays = random_inputs(config) if args.inputs is None else dict(np.load(args.inputs))
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.no_grad():
        prefix = embed_prefix(w, config, inputs, print_shape)  # [B, S, D], [B, S], [S]
        loss = training_loss(w, config, prefix, inputs, print_shape)  # [B, H]
        actions = sample_actions(w, config, prefix, inputs["state"], inputs["noise"], print_shape)  # [B, H, A]
    note = " (random inputs: not a quality measure)" if args.inputs is None else ""
    print(f"loss {loss.mean():.4f}{note}, actions from {actions.min():.3f} to {actions.max():.3f}")
    if args.out is not None:
        np.savez(args.out, loss=loss.numpy(), actions=actions.numpy())


if __name__ == "__main__":
    main()
