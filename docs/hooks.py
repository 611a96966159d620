"""Hooks of mkdocs: pages that lie outside of docs/, links to sources, and formulas.

The pages are written for a repository, where `../selsft/config.py` and a block of `math` work as they stand. Here
three pages from elsewhere join the site, a link to any other file gets a copy of that file, and formulas become
MathML, which browsers draw without a script. Rejected: MathJax or KaTeX, which load fonts and scripts from elsewhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "kernels/README.md": "kernels.md"}
SOURCES = {name: source for source, name in ELSEWHERE.items()}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for source, name in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = Path(SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def link(match: re.Match) -> str:
        text, target, anchor = match.group(1), os.path.normpath(here / match.group(2)), match.group(3) or ""
        if (ROOT / target).is_dir():
            return text  # a site has no listing of a folder
        if target.startswith("docs/"):
            address = target.removeprefix("docs/")
        elif target == "README.md":
            address, anchor = "index.md", ""
        elif target in ELSEWHERE:
            address = ELSEWHERE[target]
        else:
            address, anchor = f"source/{target}", ""
            if files.get_file_from_path(address) is None:
                files.append(File.generated(config, address, abs_src_path=str(ROOT / target)))
        return f"[{text}]({os.path.relpath(address, Path(page.file.src_uri).parent)}{anchor})"

    def part(text: str) -> str:
        if text.startswith("```math"):
            formula = text.removeprefix("```math").removesuffix("```").strip()
            return f'<div class="formula">{convert(formula, display="block")}</div>'
        return text if text.startswith("```") else LINK.sub(link, text)

    return "".join(part(each) for each in FENCE.split(markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Names as the docstrings of transformers write them, [`~trl.SFTTrainer`], lose their brackets."""
    return re.sub(r"\[<code>~?([\w.]+)</code>\]", r"<code>\1</code>", html)
