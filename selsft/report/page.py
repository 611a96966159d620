"""One HTML page from a template: a single file that loads nothing, in which text of a data set stays text.

Jinja2 escapes markup. What it does not, `visible` writes as escape sequences: control characters, which browsers
drop or replace, and formatting characters that reorder or hide the text around them. Rejected: removing them, since a
page about data should show what is in it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..records import replaced

# Controls except tab and newline, soft hyphen, bidirectional and zero-width formatting except the joiners that emoji
# and several scripts need, separators that break lines, surrogates, noncharacters, tags
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufdd0-\ufdef\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """`text` with every character that a page would drop or hide, or that reorders it, written as an escape
    sequence."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("selsft.report"), autoescape=True, undefined=jinja2.StrictUndefined,
    finalize=_shown, trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


# Files of a page's script, which is one script: they share their names
_SCRIPTS = {"inspect": ("data", "panel", "marks", "rows", "controls")}


def _script(page: str) -> Markup:
    """The script of a page as an inline element."""
    return Markup(f"<script>{_source(page)}</script>")


def _policy(page: str) -> str:
    """The source expression that allows this script alone to run, whatever else the page contains."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(_source(page).encode()).digest()).decode()}'"


def _source(page: str) -> str:
    assert _ENVIRONMENT.loader is not None
    names = (f"{page}/{name}.js" for name in _SCRIPTS[page])
    return "".join(_ENVIRONMENT.loader.get_source(_ENVIRONMENT, name)[0] for name in names)


_ENVIRONMENT.globals |= {"script": _script, "policy": _policy}


def write_page(path: Path, template: str, content: dict[str, Any]) -> Path:
    """Render `templates/<template>` with `content` into `path`, which appears when it is complete; returns `path`."""
    html = _ENVIRONMENT.get_template(template).render(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as page:
        page.write(html.encode())
    return path
