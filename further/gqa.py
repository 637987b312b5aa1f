"""
Fewer heads of keys and values in a model that was trained with all of them: Ainslie et al. 2023, "GQA: training
generalized multi-query transformer models from multi-head checkpoints", section 2.1.

    python -m further.gqa --model out/gpt-tiny --n-kv-head 1 --output out/gpt-tiny-pooled
    python train.py configs/gpt-tiny.toml --model.n_kv_head=1 --train.init_from=out/gpt-tiny-pooled \\
        --train.out_dir=out/gpt-tiny-mqa --train.steps=20 --train.warmup_steps=2 --train.lr=5e-3

The first makes the projection of a group's keys the mean of those of its heads, and so with the values; queries stay.
That is a good beginning and a bad model: the second trains it for another 5 % of its steps, at a lower rate. Here each
key head serves neighbouring query heads, so neighbours are what is pooled. Heads that are equal already lose nothing.
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


def pool(x, KV, groups, D):
    """
    Rows of a projection to KV heads of keys and as many of values, behind those to queries, if any: a weight or a bias
    (C + 2 KV D or 2 KV D, ...) -> (C + 2 groups D or 2 groups D, ...), the means of neighbours.
    """
    queries, shared = x[: -2 * KV * D], x[-2 * KV * D :]
    heads = shared.unflatten(0, (2, groups, KV // groups, D))  # keys and values, groups, heads of a group
    return torch.cat([queries, heads.mean(2).flatten(0, 2)])


def convert(model, **kv_heads):
    """
    A new GPT or BART in eval mode that shares key/value heads as these fields of its configuration say (n_kv_head; of a
    BART also n_decoder_kv_head and n_cross_kv_head, which outrank it), with the other weights of `model`. Raises
    UserError, before anything is allocated, on a number that does not divide what the model has, or a field that it has
    not.
    """
    for name in kv_heads.keys() - {field.name for field in fields(model.config)}:
        raise UserError(f"{name}={kv_heads[name]} is for a BART, and this is a {type(model).__name__}: use n_kv_head")
    config = replace(model.config, **kv_heads)
    config.validate()
    for role in ROLES:
        has, wanted = (head_sizes(one.of(role))[1] for one in (model.config, config))
        if has % wanted:
            raise UserError(f"{wanted} key/value heads cannot be pooled from {has}, those of this model's {role}: "
                            f"choose a number that divides {has}")
    pooled, state = type(model)(config), model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            groups = pooled.get_submodule(name).n_kv_head
            for key in [f"{name}.{end}" for end in ("c_attn.weight", "c_attn.bias", "c_kv.weight", "c_kv.bias")]:
                if key in state:
                    state[key] = pool(state[key], module.n_kv_head, groups, module.head_dim)
    pooled.to(model.wte.weight).load_state_dict(state)
    return pooled.eval()


def main(args=None):
    parser = Parser(prog="further.gqa", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR_OR_NAME", required=True, help="a Hugging Face directory, a run, or a name on the hub")
    add("--n-kv-head", type=WHOLE, metavar="N", help="key/value heads in every attention; 1 is multi-query")
    add("--n-decoder-kv-head", type=WHOLE, metavar="N", help="of a BART: in its decoder's self-attention")
    add("--n-cross-kv-head", type=WHOLE, metavar="N", help="of a BART: in the attention to the source")
    add("--output", metavar="DIR", required=True, help="where the model is written, which must not be there yet")
    args = parser.parse_args(args)
    kv_heads = {name: value for name, value in vars(args).items() if name.endswith("kv_head") and value is not None}
    if not kv_heads:
        raise UserError("nothing to pool: give --n-kv-head, --n-decoder-kv-head or --n-cross-kv-head")
    if os.path.lexists(args.output):
        raise UserError(f"--output {args.output} is there already: name another directory")
    model, tokenizer = load_pretrained(args.model)
    pooled = convert(model, **kv_heads)
    save_pretrained(args.output, pooled, tokenizer)
    print(f"{args.output}: {model.count_parameters():,} -> {pooled.count_parameters():,} parameters; the config of its "
          f"training takes {' '.join(f'--model.{name}={value}' for name, value in kv_heads.items())} "
          f"--train.init_from={args.output}")


if __name__ == "__main__":
    run(main)
