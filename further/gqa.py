"""
Fewer heads of keys and values in a model that was trained with all of them, as in Ainslie et al. 2023, "GQA: training
generalized multi-query transformer models from multi-head checkpoints", section 2.1; or with less lost.

    python -m further.gqa --model out/gpt-tiny --n-kv-head 1 --output out/gpt-tiny-pooled [--by span]
    python train.py configs/gpt-tiny.toml --model.n_kv_head=1 --train.init_from=out/gpt-tiny-pooled \\
        --train.out_dir=out/gpt-tiny-mqa --train.steps=20 --train.warmup_steps=2 --train.lr=5e-3

The first makes one head of the neighbours that shall share it, the second trains the model for another 5 % of its
steps, at a lower rate. By their *mean*, as the paper does, it is a good beginning and a bad model: which number of a
head means what is an accident of its training, so a mean is of things that have nothing to do with each other. But a
head's keys may be changed by any matrix if its queries are changed by the inverse, and its values if c_proj is. So by
their *span*, the shared head reads what serves all of the group best, the leading singular vectors of their projections
together, and each query head, and each part of c_proj, takes up the matrix that leads from it back to its old one.

Heads that are equal already lose nothing.
"""

import os
from dataclasses import fields, replace

from plumbing.errors import WHOLE, Parser, UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

import torch

from attention import Attention, head_sizes
from plumbing.weights import load_pretrained, save_pretrained

ROLES = ("decoder", "encoder", "cross")


def mean(heads):
    """The n heads of a group, (KV, n, D, C + 1) -> the one they share, (KV, D, C + 1), and how each is made of it."""
    return heads.mean(1), torch.eye(heads.size(2)).to(heads).expand(*heads.shape[:2], -1, -1)


def span(heads):
    """As mean(); the products (KV, n, D, D) with the shared head are as near to each head as D directions can be."""
    _, size, directions = torch.linalg.svd(heads.flatten(1, 2), full_matrices=False)
    size, directions = (x[:, : heads.size(2)] for x in (size, directions))
    shared = directions * (size / heads.size(1) ** 0.5).sqrt()[..., None]  # half of the size is left to the products
    return shared, heads @ torch.linalg.pinv(shared)[:, None]


WAYS = {"mean": mean, "span": span}


@torch.no_grad()
def pool(module, groups, way):
    """The new tensors of an attention whose heads share so many keys and values, by name."""
    KV, D = module.n_kv_head, module.head_dim
    names = ["c_attn"] if hasattr(module, "c_attn") else ["c_q", "c_kv"]
    parts = [getattr(module, name) for name in names]
    rows = torch.cat([torch.cat([part.weight, part.bias[:, None]], 1) for part in parts]).double()  # (..., C + 1)
    q, k, v = rows.unflatten(0, (-1, D)).split([module.n_head, KV, KV])
    (k, asks), (v, adds) = (way(x.unflatten(0, (groups, -1))) for x in (k, v))
    asks, adds = (x.flatten(0, 1).repeat_interleave(module.n_head // KV, 0) for x in (asks, adds))  # (H, D, D)
    out = module.c_proj.weight.double().unflatten(1, (-1, D)).transpose(0, 1)  # (H, C, D)
    rows, new = torch.cat([asks.mT @ q, k, v]).flatten(0, 1), {"c_proj.weight": (out @ adds).transpose(0, 1).flatten(1)}
    for name, part in zip(names, rows.tensor_split([module.n_head * D][: len(names) - 1])):
        new |= {f"{name}.weight": part[:, :-1], f"{name}.bias": part[:, -1]}
    return new


def convert(model, way=mean, **kv_heads):
    """
    A new GPT or BART in eval mode that shares key/value heads as these fields of its configuration say (n_kv_head; of a
    BART also n_decoder_kv_head and n_cross_kv_head, which outrank it), pooled by mean or span, with the other weights
    of `model`. Raises UserError, before anything is allocated, on a number that does not divide what the model has, or
    a field that it has not.
    """
    for name in kv_heads.keys() - {field.name for field in fields(model.config)}:
        raise UserError(f"{name}={kv_heads[name]} is for a BART, and this is a {type(model).__name__}: use n_kv_head")
    if not model.lm_head.weight.is_floating_point():
        raise UserError("the weights of this model are whole numbers: pool the one that it was made of")
    config = replace(model.config, **kv_heads)
    config.validate()
    for role in ROLES:
        has, wanted = (head_sizes(one.of(role))[1] for one in (model.config, config))
        if has % wanted:
            raise UserError(f"{wanted} key/value heads cannot be pooled from {has}, those of this model's {role}: "
                            f"choose a number that divides {has}")
    pooled, state = type(model)(config), model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Attention) and (groups := pooled.get_submodule(name).n_kv_head) < module.n_kv_head:
            state |= {f"{name}.{key}": x for key, x in pool(module, groups, way).items()}
    pooled.to(model.wte.weight).load_state_dict(state)
    return pooled.eval()


def main(args=None):
    parser = Parser(prog="further.gqa", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR_OR_NAME", required=True, help="a Hugging Face directory, a run, or a name on the hub")
    add("--n-kv-head", type=WHOLE, metavar="N", help="key/value heads in every attention; 1 is multi-query")
    add("--n-decoder-kv-head", type=WHOLE, metavar="N", help="of a BART: in its decoder's self-attention")
    add("--n-cross-kv-head", type=WHOLE, metavar="N", help="of a BART: in the attention to the source")
    add("--by", choices=WAYS, default="mean", help="how heads are made one; default: mean, as the paper does")
    add("--output", metavar="DIR", required=True, help="where the model is written, which must not be there yet")
    args = parser.parse_args(args)
    kv_heads = {name: value for name, value in vars(args).items() if name.endswith("kv_head") and value is not None}
    if not kv_heads:
        raise UserError("nothing to pool: give --n-kv-head, --n-decoder-kv-head or --n-cross-kv-head")
    if os.path.lexists(args.output):
        raise UserError(f"--output {args.output} is there already: name another directory")
    model, tokenizer = load_pretrained(args.model)
    pooled = convert(model, WAYS[args.by], **kv_heads)
    save_pretrained(args.output, pooled, tokenizer)
    print(f"{args.output}: {model.count_parameters():,} -> {pooled.count_parameters():,} parameters; the config of its "
          f"training takes {' '.join(f'--model.{name}={value}' for name, value in kv_heads.items())} "
          f"--train.init_from={args.output}")


if __name__ == "__main__":
    run(main)
