"""List the methods with what they are made of, or show the page of one, a loss or a policy.

%(prog)s
%(prog)s DKD_LP
%(prog)s MINE EXPERIMENT.IMPORT "['my_losses']"
%(prog)s --markdown              # all pages: docs/methods.md
"""

import argparse
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, bare

if TYPE_CHECKING:
    from ..distillers import Recipe
    from ..settings import Settings

IMPORT, NO_SETTINGS = "EXPERIMENT.IMPORT", "No settings."
HEAD = """# Methods

Written by `mdistiller-ext methods --markdown` from the code. A method is a *loss*, which compares
the logits of student and teacher, and *policies*, which say over which classes, at which
temperatures and with which weights. Its total is

`CE_WEIGHT cross_entropy(z_s, y) + min(epoch / WARMUP, 1) KD_WEIGHT mean_i(w_i f_i loss_i)`

with a factor `f_i` that belongs to the loss, as T², and the product `w_i` of the weights that
policies and loss give to a sample. Policies act in this order, whatever the order in a config:
base temperature, classes, statistic of the temperature, spread over the batch, weights of samples,
size of the gradient.

`z_s`, `z_t`: logits of student and teacher. `y`: label. KL is in nats, from the teacher to the
student. All losses are computed in log space and in float32 or better, and are finite with finite
gradients: [exactness.md](exactness.md).

Left out are CRLD and MLKD's strong view, which show each network a second, strongly augmented view
that no teacher table has; SDD, which takes feature maps; WKD-L, which takes the teacher's features
or classifier; DOT and DeepKD, optimisers of several backward passes a step; SKD and RLKD, which
have training of their own or no public code; TeKAP, whose noisy teachers also raise KD_WEIGHT.
"""

ANY = """Any loss with any policies is a method, without a line of code:

```yaml
DISTILLER: {TYPE: LOGIT, TEACHER: resnet56, STUDENT: resnet8}
LOGIT: {LOSS: TTM, POLICIES: [EAT, LP], T: 4.0, KD_WEIGHT: 7.0, LP: {RATIOS: [0.0, 0.4]}}
```

Each loss and policy has a section of its own in LOGIT for its settings. Settings of parts that are
not named are refused, and so is what is not well defined, with the reason. A number beside a loss
means that a policy does not go with it, both as they are by default:
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?")
    parser.add_argument("--markdown", action="store_true", help="all pages, as Markdown")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="EXPERIMENT.IMPORT")


def main(args: argparse.Namespace) -> None:
    from ..config import as_pairs, load_cfg
    from ..distillers import RECIPES, distiller_dict
    from ..losses import LOSSES
    from ..plugins import import_modules
    from ..policies import POLICIES

    if args.name == IMPORT:  # without a name before it
        args.name, args.opts = None, [IMPORT, *args.opts]
    if strange := as_pairs(args.opts).keys() - {IMPORT}:
        raise ConfigError(f"{bare(min(strange))}: has no effect here, only {IMPORT}")
    import_modules(load_cfg(None, args.opts).EXPERIMENT.IMPORT if args.opts else [])
    parts: dict[str, Any] = {**POLICIES, **LOSSES}
    whole = {name: cls for name, cls in distiller_dict.items() if name not in RECIPES}
    if args.markdown:
        print(markdown(), end="")
    elif args.name is None:
        rows = {name: made_of(recipe) for name, recipe in RECIPES.items()}
        rows |= {name: doc_of(cls).partition("\n")[0] for name, cls in whole.items()}
        width = max(map(len, rows)) + 2
        print("\n".join(f"{name:<{width}}{text}".rstrip() for name, text in rows.items()))
    elif args.name in RECIPES and RECIPES[args.name].loss:
        recipe = RECIPES[args.name]
        print(f"{args.name}: {made_of(recipe)}\n\n{settings_of(recipe)}")
        for part in (recipe.loss, *recipe.policies):
            print(f"\n{part}: {doc_of(parts[part])}")
    elif args.name in parts:
        print(f"{doc_of(parts[args.name])}\n\n{table(parts[args.name])}")
    elif args.name in whole:
        settings = getattr(whole[args.name], "SETTINGS", None)
        print(f"{doc_of(whole[args.name])}\n\n{table(settings) if settings else NO_SETTINGS}")
    else:
        known = ", ".join(sorted({*RECIPES, *parts, *whole}))
        raise ConfigError(f"{args.name}: no method, loss or policy, expected one of {known}")


def doc_of(part: Any) -> str:
    return cleandoc(part.__doc__ or "")


def made_of(recipe: "Recipe") -> str:
    return " + ".join([recipe.loss, *recipe.policies]) if recipe.loss else "any loss and policies"


def settings_of(recipe: "Recipe") -> str:
    """The node of a method with its defaults, on one line."""
    from ..settings import leaves

    return ", ".join(f"{key} {value!r}" for key, value in leaves(recipe.node()))


def table(part: "type[Settings]") -> str:
    rows = ["| setting | default | allowed | |", "|---|---|---|---|"]
    meanings, defaults = part.meanings(), part.defaults()
    for key, (_, text) in part.rules().items():
        rows.append(f"| `{key}` | `{defaults[key]!r}` | {text} | {meanings[key]} |")
    return "\n".join(rows) if defaults else NO_SETTINGS


def markdown() -> str:
    """All pages: every method, loss and policy, and what goes with what."""
    from ..distillers import RECIPES
    from ..losses import LOSSES
    from ..policies import POLICIES, SLOTS

    lines = [HEAD, "## By name", "", "| `DISTILLER.TYPE` | made of | node | settings from |"]
    lines.append("|---|---|---|---|")
    for name, recipe in RECIPES.items():
        if recipe.loss:
            row = f"{made_of(recipe)} | {settings_of(recipe)} | {recipe.source}"
            lines.append(f"| `{name}` | {row} |")
    lines += ["", "## LOGIT: any loss with any policies", "", ANY, combinations(), ""]
    lines.append("# Losses\n")
    for name, loss in sorted(LOSSES.items()):
        lines.append(f"## {name}\n\n{doc_of(loss)}\n\n{table(loss)}\n")
    lines.append("# Policies\n")
    for name, policy in sorted(POLICIES.items()):
        sets = f"Sets {SLOTS[policy().slot]}."
        lines.append(f"## {name}\n\n{doc_of(policy)}\n\n{sets}\n\n{table(policy)}\n")
    return "\n".join(lines)


def combinations() -> str:
    """What combines with what, at default settings."""
    from ..distillers.recipes import Composition, Weights
    from ..losses import LOSSES
    from ..policies import POLICIES

    notes: dict[str, int] = {}

    def cell(loss: str, policy: str) -> str:
        reason = Composition(Weights(), LOSSES[loss](), (POLICIES[policy](),)).conflict
        return f"{notes.setdefault(reason, len(notes) + 1)}" if reason else ""

    policies = sorted(POLICIES)
    rows = [f"| | {' | '.join(policies)} |", "|---" * (len(policies) + 1) + "|"]
    for loss in sorted(LOSSES):
        rows.append(f"| **{loss}** | {' | '.join(cell(loss, p) for p in policies)} |")
    rows += ["", *(f"{number}. {reason}." for reason, number in notes.items())]
    owners: dict[str, list[str]] = {}
    for name, policy in POLICIES.items():
        owners.setdefault(policy().slot, []).append(name)
    for slot, names in owners.items():
        if len(names) > 1 and slot != "weight":
            rows.append(f"\nOf {', '.join(names)} one can be chosen.")
    return "\n".join(rows)
