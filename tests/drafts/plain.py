"""A block's hidden states in plain loops, in fp64: one slot, one head, one key at a time, from the formulas alone."""

import math

import torch


def block_hidden(draft, ids, taps, anchor):
    """Of the slots that predict of the block at ``anchor`` of one sample (ids [S], taps [S, T·H]): [γ, H]."""
    config = draft.config
    weights = {name: tensor.detach().double() for name, tensor in draft.state_dict().items()}
    width = config.block_size + (0 if config.sample_from_anchor else 1)
    taps = taps[:anchor].double()
    context = [_norm(weights["fc.weight"] @ row, weights["hidden_norm.weight"], config) for row in taps]
    embedding = weights["embed_tokens.weight"]
    hidden = [embedding[ids[anchor]], *[embedding[config.mask_token_id]] * (width - 1)]
    for layer in range(config.num_hidden_layers):
        start = f"layers.{layer}."
        own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        block = [_norm(slot, own["input_layernorm.weight"], config) for slot in hidden]
        attended = _attend(own, config, context, block, anchor)
        hidden = [slot + own["self_attn.o_proj.weight"] @ new for slot, new in zip(hidden, attended, strict=True)]
        hidden = [slot + _mlp(own, _norm(slot, own["post_attention_layernorm.weight"], config)) for slot in hidden]
    return torch.stack([_norm(slot, weights["norm.weight"], config) for slot in hidden[-config.block_size :]])


def _attend(own, config, context, block, anchor):
    """The heads' outputs of every slot, side by side."""
    sources, shared = [*context, *block], range(config.num_key_value_heads)
    keys = [[_head(own, "k", source, head, at, config) for at, source in enumerate(sources)] for head in shared]
    values = [[_part(own["self_attn.v_proj.weight"], head, config) @ source for source in sources] for head in shared]
    outputs = []
    for slot, source in enumerate(block):
        at, heads = anchor + slot, []
        for head in range(config.num_attention_heads):
            group = head // (config.num_attention_heads // config.num_key_value_heads)
            query = _head(own, "q", source, head, at, config)
            mass, total = 0.0, torch.zeros(config.head_dim, dtype=torch.float64)
            for position in range(anchor + len(block)):
                if position < anchor and config.sliding_window is not None and at - position >= config.sliding_window:
                    continue
                if position > at and config.causal_block:
                    continue
                share = math.exp(query @ keys[group][position] / math.sqrt(config.head_dim))
                mass, total = mass + share, total + share * values[group][position]
            if config.attention_sinks:
                mass += math.exp(own["self_attn.attention_sink_bias"][head])
            heads.append(total / mass)
        outputs.append(torch.cat(heads))
    return outputs


def _head(own, kind, source, head, position, config):
    """A normed and rotated query or key: component i and i + d/2 are a complex number, turned by position·θ^(-2i/d)."""
    vector = _part(own[f"self_attn.{kind}_proj.weight"], head, config) @ source
    real, imaginary = _norm(vector, own[f"self_attn.{kind}_norm.weight"], config).chunk(2)
    angles = [position / config.rope_theta ** (2 * pair / config.head_dim) for pair in range(config.head_dim // 2)]
    turn = torch.tensor([complex(math.cos(angle), math.sin(angle)) for angle in angles], dtype=torch.complex128)
    turned = torch.complex(real, imaginary) * turn
    return torch.cat((turned.real, turned.imag))


def _part(weight, head, config):
    return weight[head * config.head_dim : (head + 1) * config.head_dim]


def _mlp(own, x):
    gate = own["mlp.gate_proj.weight"] @ x
    return own["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (own["mlp.up_proj.weight"] @ x))


def _norm(x, weight, config):
    return x / (x.square().mean() + config.rms_norm_eps).sqrt() * weight
