"""Escaping of text for Markdown and LaTeX."""

from __future__ import annotations

_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%_#${}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "±": r"$\pm$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "–": "--",
    }
)


def for_markdown(text: str) -> str:
    """Escapes Markdown and HTML, and joins lines."""
    for mark in ("\\", "|", "*", "`"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def for_latex(text: str) -> str:
    """Escapes the special characters of LaTeX, and the signs that our tables use."""
    return text.translate(_LATEX)
