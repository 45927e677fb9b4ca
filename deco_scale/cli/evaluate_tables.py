"""Tables of ``deco evaluate``."""

from rich.console import Console
from rich.table import Table

from deco_scale.evaluation import dpg, geneval
from deco_scale.evaluation.fid import Scores


def print_scores(scores: Scores, console: Console) -> None:
    """The five scores of a file of pictures."""
    table = Table("score", "value", title=f"{scores.pictures} pictures")
    for name, label in (
        ("fid", "FID"),
        ("sfid", "sFID"),
        ("inception_score", "Inception score"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        value = getattr(scores, name)
        table.add_row(label, "the reference does not allow it" if value is None else f"{value:.4f}")
    console.print(table)


def print_geneval(summary: geneval.Summary, console: Console) -> None:
    """Right pictures by task, and the overall score."""
    table = Table("task", "right", "pictures", "score", title="GenEval")
    for name, (right, count) in summary.tasks.items():
        table.add_row(name, str(right), str(count), f"{right / count:.2%}")
    table.add_section()
    for name, (right, count) in (("all pictures", summary.pictures), ("prompts, any picture", summary.prompts)):
        table.add_row(name, str(right), str(count), f"{right / count:.2%}")
    table.add_row("overall, mean of tasks", "", "", f"{summary.overall:.5f}")
    console.print(table)


def print_dpg(summary: dpg.Summary, console: Console) -> None:
    """Scores of broad categories, each followed by its detailed ones, and the overall score."""
    table = Table("category", "score", title=f"DPG-Bench, {summary.grids} prompts")
    for name, score in summary.broad.items():
        table.add_row(name, f"{score:.2f}")
        for detail, value in summary.detailed.items():
            if detail.partition("-")[0].strip() == name:
                table.add_row(f"  {detail}", f"{value:.2f}")
    table.add_section()
    table.add_row("overall", f"{summary.overall:.2f}")
    console.print(table)
