"""Write the pages of docs/ whose truth is in the code: ``make docs``.

``python docs/generate.py --check`` writes nothing and exits with 1 where a page is not what the code says.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterable, Mapping
from enum import IntFlag
from pathlib import Path
from typing import Any

import click

import batchproc
from batchproc import cli, config, records
from batchproc.distribute import sites
from batchproc.finish.focal import FOCAL_PLANES
from batchproc.io.cards import read_card

HERE = Path(__file__).parent
MADE = "<!-- Made by docs/generate.py from {source}; change it there, then run `make docs`. -->"


def catalogue() -> str:
    """The columns of the catalogue, the bits of its flags and of the masks behind them."""
    columns = [(f"`{c.name}`", c.dtype, c.unit, c.meaning) for c in records.CATALOGUE]
    return page(
        "The catalogue",
        "batchproc/records.py",
        "One row a candidate. The same names and units are in the schema of the Parquet files. "
        "“File unit” is the unit of the pixels of `new`, as its file has it.",
        table(("column", "dtype", "unit", "meaning"), columns),
        "## `flags`",
        "Bits of `batchproc.Flag`; 0 is a clean detection.",
        bits(records.Flag),
        "## Masks",
        "Bits of the image masks from which the flags follow; 0 is a good pixel.",
        bits(records.MaskBit),
        "## `focal_planes.parquet`",
        "One row an image of the manifest, made by `batchproc finish` (see [finish](finish.md)).",
        table(
            ("column", "dtype", "unit", "meaning"), [(f"`{c.name}`", c.dtype, c.unit, c.meaning) for c in FOCAL_PLANES]
        ),
    )


def configuration() -> str:
    """Every setting: one table of the TOML file a stage."""
    defaults = config.Config()
    top, parts = [], []
    for name, about in field_docs(config.Config).items():
        value = getattr(defaults, name)
        if not dataclasses.is_dataclass(value):
            top.append((f"`{name}`", f"`{toml(value)}`", about))
            continue
        cls = type(value)
        rows = [(f"`{key}`", f"`{toml(getattr(value, key))}`", text) for key, text in field_docs(cls).items()]
        parts += [f"## `[{name}]`", inspect.cleandoc(cls.__doc__ or ""), table(("key", "default", "meaning"), rows)]
    return page(
        "Configuration",
        "batchproc/config.py",
        "`batchproc run … --config C.toml`. Every key is optional, and a key left out has the default given here. An "
        "unknown key, a wrong type or a value out of range is refused before anything starts. The settings in force "
        "are kept in `RUN/config.toml`.",
        "```toml\nthreads = 1\n\n[detect]\nthreshold = 6.0\n```",
        table(("key", "default", "meaning"), top),
        *parts,
    )


def site_keys() -> str:
    """Every key of a site profile."""
    site = sites.Site()
    parts = []
    for title, cls, values in (
        ("", sites.Site, site),
        ("## `[driver]`", sites.DriverJob, site.driver),
        ("## `[certificates]`", sites.Certificates, site.certificates),
    ):
        rows = [
            (f"`{key}`", f"`{toml(getattr(values, key))}`", text)
            for key, text in field_docs(cls).items()
            if not dataclasses.is_dataclass(getattr(values, key))
        ]
        parts += [title, inspect.cleandoc(cls.__doc__ or ""), table(("key", "default", "meaning"), rows)]
    return page(
        "Keys of a site profile",
        "batchproc/distribute/sites.py",
        "An unknown key, a wrong type or a value out of range is refused before anything starts. What must be given is "
        "said; all else may be left out.",
        *filter(None, parts),
    )


def command_line() -> str:
    """Every verb with its arguments, options and example."""
    group = cli.cli
    return page(
        "The command line",
        "batchproc/cli",
        "`batchproc VERB --help` says the same. Results go to standard output, progress and errors to standard error.",
        table(
            ("exit code", "means"),
            [
                ("0", "all done; with `--pilot`, what was asked for"),
                ("1", "finished; some images failed, and are listed, or were never tried"),
                ("2", "usage or bad configuration; nothing was started"),
                ("3", "stopped by a bug or a fault"),
            ],
        ),
        *verbs(group, "batchproc"),
    )


def bundled_model() -> str:
    """The card of the model that comes with batchproc."""
    card = read_card(Path(batchproc.__file__).parent / "models" / "realbogus")
    float_only = [m for m in card.metrics if m["variant"] == "float"]
    rows = [
        (
            str(m["on"]),
            str(m["selection"]),
            f"{m['n_real']}, {m['n_bogus']}",
            str(m["n_groups"]),
            ranged(m, "auc_pr"),
            ranged(m, "auc_roc"),
            ranged(m, "bogus_removed_at_99_completeness"),
            number(m, "auc_pr_of_scorr"),
            number(m, "bogus_removed_at_99_completeness_by_scorr"),
        )
        for m in float_only
    ]
    agreement = [
        (
            f"`{name}`",
            f"{q['largest_difference']:.3f}",
            f"{q['mean_difference']:.4f}",
            f"{q['lost']}, {q['gained']}",
            f"{q['auc_pr_float']:.4f}",
            f"{q['auc_pr']:.4f}",
        )
        for name, q in card.quantisation.items()
    ]
    learnt, wanted = card.training, card.input
    twice = f", and {wanted.size} × {wanted.size} of twice their size around the same middle,"
    views = f"{wanted.size} × {wanted.size} pixels{twice if len(wanted.scales) > 1 else ''} of "
    taught = f" ({learnt['n_taught']:,} of these)" if "n_taught" in learnt else ""
    return page(
        f"The bundled model: {card.name} {card.version}",
        "batchproc/models/realbogus/card.toml",
        card.description,
        f"It sees {views}{', '.join(wanted.channels)}, normalised by `{wanted.normalisation}`, has "
        f"{learnt['parameters']:,} parameters, and learnt from {learnt['n_train']['real']:,} real and "
        f"{learnt['n_train']['bogus']:,} bogus candidates: {learnt['data']}{taught}. Why so: "
        "[what it learns from](decisions/010-model-learns-from-this-pipeline.md), "
        "[two scales and a teacher](decisions/025-two-scales-and-a-teacher.md).",
        "Stamps, network and every figure below, in two hours of two cores (extra `train`):",
        "```console\n$ python -m batchproc.training.realbogus --data DIR --out realbogus --threads 2\n```",
        "## What it is worth",
        "On images and regions that were not learnt from. AUC-PR is for real : bogus of 1 : 1; real ones are planted "
        "with a PSF that the pipeline is not told, artefacts are all else that it finds, flagged ones included where "
        "nothing else is said. Intervals: 95 %, bootstrapped by region (alerts: singly). The last columns are what "
        "the significance of a candidate tells alone.",
        table(
            (
                *("on", "what", "real, bogus", "regions", "AUC-PR", "ROC AUC", "bogus removed at 99 % completeness"),
                *("AUC-PR of S_corr alone", "bogus removed by it"),
            ),
            rows,
        ),
        "GOTO's pair is one field, into which transients are planted in several rounds: its artefacts come more than "
        "once, and its regions are few. No network has learnt from its images or from ZTF's alerts; but what networks "
        "learn from was chosen after looking at what earlier ones got wrong there, so neither is quite unseen. And "
        "`drb` is braai's answer to an alert, as what this network learnt besides were braai's to other stamps: that "
        "line says how much of braai's judgement it has, not how often that is right.",
        "## In 8 bits",
        "Against float, on validation stamps that were not calibrated on; *lost* and *gained* at the card's threshold "
        f"of {card.threshold}. The default is `{card.default_variant}`.",
        table(
            ("variant", "largest difference", "mean", "lost, gained", "AUC-PR at 1:1 in float", "AUC-PR at 1:1"),
            agreement,
        ),
        "How fast: [performance](performance.md#scoring-stamps).",
    )


def number(metrics: Mapping[str, Any], name: str) -> str:
    """A value that may not be there."""
    return f"{metrics[name]:.3f}" if name in metrics else "–"


def ranged(metrics: Mapping[str, Any], name: str) -> str:
    """A value and its interval."""
    low, high = metrics[f"{name}_interval"]
    return f"{metrics[name]:.3f} ({low:.3f}–{high:.3f})"


def verbs(group: click.Group, prefix: str) -> list[str]:
    """The sections of a group's verbs, and of the groups inside it."""
    parts = []
    for name, command in group.commands.items():
        path = f"{prefix} {name}"
        if isinstance(command, click.Group):
            parts += verbs(command, path)
            continue
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        options = [p for p in command.params if isinstance(p, click.Option)]
        usage = " ".join([path, *(f"{p.human_readable_name}{'…' if p.nargs == -1 else ''}" for p in arguments)])
        parts += [f"## `{usage}`", inspect.cleandoc(command.help or "")]
        if options:
            parts.append(table(("option", "meaning"), map(option_row, options)))
        if command.epilog:
            example = [line.strip() for line in command.epilog.splitlines() if line.startswith("  ")]
            parts.append("\n".join(["```console", *(f"$ {line}" for line in example), "```"]))
    return parts


def option_row(option: click.Option) -> tuple[str, str]:
    """Name and meaning of an option."""
    value = "" if option.is_flag else f" {option.metavar or option.human_readable_name.upper()}"
    default = f" Default: `{option.default}`." if option.show_default else ""
    needed = " Required." if option.required else ""
    meaning = " ".join((option.help or "").replace("[default:", "(default:").replace("]", ")").split())
    return f"`{', '.join(option.opts)}{value}`", f"{meaning}{default}{needed}"


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, by the field's name."""
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for here, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name):
            text = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                text = inspect.cleandoc(str(below.value.value))
            docs[here.target.id] = " ".join(text.split())
    return docs


def bits(flags: type[IntFlag]) -> str:
    """A table of an `IntFlag`; the meanings are the comments beside its members."""
    rows = []
    for line in inspect.getsource(flags).splitlines():
        code, _, meaning = line.partition("#:")
        name = code.split("=")[0].strip()
        if meaning and name in flags.__members__:
            rows.append((str(flags[name].value), f"`{name}`", meaning.strip()))
    return table(("bit", "name", "meaning"), rows)


def toml(value: Any) -> str:
    """A default as one writes it in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f'"{value}"' if isinstance(value, str) else str(value)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---" for _ in head], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page(title: str, source: str, *parts: str) -> str:
    """A page that says where it comes from."""
    return "\n\n".join([f"# {title}", MADE.format(source=source), *parts]) + "\n"


PAGES = {
    "catalogue.md": catalogue,
    "cli.md": command_line,
    "configuration.md": configuration,
    "../cluster/keys.md": site_keys,
    "realbogus.md": bundled_model,
}


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them (``--check``)."""
    stale = [
        name
        for name, make in PAGES.items()
        if not (HERE / name).exists() or (HERE / name).read_text(encoding="utf-8") != make()
    ]
    if "--check" in arguments:
        if stale:
            print(f"not what the code says: {', '.join(f'docs/{name}' for name in stale)}; run `make docs`")
        return 1 if stale else 0
    for name in stale:
        (HERE / name).write_text(PAGES[name](), encoding="utf-8")
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
