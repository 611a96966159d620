"""Secrets stay in the environment: out of every record, report, log line and uploaded file.

Two mechanisms. At the door, a token among the flags becomes `HF_TOKEN` of this process (`to_environment`), which
`huggingface_hub` and child processes read; the flag itself is emptied, so that nothing that is saved later, such as
the pickled `training_args.bin`, has it. And every record passes through `redact`, which hides values by the name of
their key and wherever a known secret occurs in a text. Rejected: hiding known fields one by one in each writer, which
misses the next field.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from .errors import InputError

HIDDEN = "<hidden>"
_WORDS = {
    "token",
    "secret",
    "password",
    "passwd",
    "passphrase",
    "credential",
    "credentials",
    "api_key",
    "apikey",
    "authorization",
}
_ENDINGS = tuple(f"_{word}" for word in (*_WORDS, "access_key", "secret_key", "private_key", "auth_key"))
# Fields that end like a secret and are text of a vocabulary
_PUBLIC = re.compile(r"(eos|bos|pad|unk|sep|cls|mask|image|video|audio|decoder_start|special|per|next)_token")
_IN_TEXT = re.compile(r"""(["']?)([A-Za-z_]*[A-Za-z])\1(\s*[:=]\s*)(["'])((?:(?!\4).)+)\4""")
# The password of https://user:password@host
_IN_URL = re.compile(r"""(?<=://)([^/\s:@'"]*):([^/\s@'"]+)@""")
_SHORTEST = 8  # characters; hiding each "1" of an environment variable would garble every record


def is_secret(name: str) -> bool:
    """Whether a field, flag or variable of this name holds a secret: `hub_token`, `WANDB_API_KEY`, `--password`."""
    plain = name.strip("-").lower().replace("-", "_").replace(".", "_")
    if _PUBLIC.search(plain):
        return False
    return plain in _WORDS or plain.endswith(_ENDINGS)


def redact(content: Any) -> Any:
    """JSON-like `content` without secrets; everything else unchanged.

    Hidden are values of secret keys at any depth, the value after a secret flag in a list of arguments, the same
    within texts that hold JSON or YAML, passwords in URLs, and any text that contains a secret found in these ways or
    in the environment.
    """
    known = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST}
    in_urls = {match[2] for value in os.environ.values() for match in _IN_URL.finditer(value)}
    known |= {value for value in (*in_urls, *_values(content)) if len(value) >= _SHORTEST}
    return _hide(content, sorted(known, key=len, reverse=True))


def to_environment(flags: MutableMapping[str, Any]) -> None:
    """Empty the Hub tokens of `flags`, nested ones too, and make them `HF_TOKEN` of this process.

    Raises:
        `InputError` when two different tokens are given.
    """
    found: dict[str, str] = {}
    for name, value in flags.items():
        if is_secret(name) and isinstance(value, str) and value:
            found[name] = value
            flags[name] = None
        elif isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                inner = json.loads(value)
            except ValueError:
                continue
            if taken := _take(inner):
                found |= {f"{name}.{key}": secret for key, secret in taken.items()}
                flags[name] = json.dumps(inner)
        elif isinstance(value, dict):
            found |= {f"{name}.{key}": secret for key, secret in _take(value).items()}
    if len(set(found.values())) > 1:
        raise InputError(f"{' and '.join(found)} are different tokens: give one, which all models are loaded with")
    for value in found.values():
        os.environ["HF_TOKEN"] = value


def _take(mapping: dict[str, Any]) -> dict[str, str]:
    """Remove the secrets of a mapping and return them."""
    names = [name for name, value in mapping.items() if is_secret(name) and isinstance(value, str) and value]
    return {name: mapping.pop(name) for name in names}


def _values(content: Any) -> Iterator[str]:
    """The secrets that the names around them give away."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            if isinstance(name, str) and is_secret(name) and isinstance(value, str) and value != HIDDEN:
                yield value
            else:
                yield from _values(value)
    elif isinstance(content, list | tuple):
        for before, value in zip(["", *content], content, strict=False):
            if isinstance(before, str) and before.startswith("-") and is_secret(before) and isinstance(value, str):
                yield value
            else:
                yield from _values(value)
    elif isinstance(content, str):
        for match in _IN_TEXT.finditer(content):
            if is_secret(match[2]):
                yield match[5]
        for match in _IN_URL.finditer(content):
            yield match[2]
        name, equals, value = content.partition("=")
        if equals and name.startswith("-") and is_secret(name):
            yield value


def _hide(content: Any, known: list[str]) -> Any:
    if isinstance(content, Mapping):
        return {
            name: HIDDEN if isinstance(name, str) and is_secret(name) and isinstance(value, str) and value else value
            for name, value in ((name, _hide(value, known)) for name, value in content.items())
        }
    if isinstance(content, list | tuple):
        return [
            HIDDEN if isinstance(before, str) and before.startswith("-") and is_secret(before) else _hide(value, known)
            for before, value in zip(["", *content], content, strict=False)
        ]
    if isinstance(content, str):
        for secret in known:
            content = content.replace(secret, HIDDEN)
        content = _IN_URL.sub(rf"\1:{HIDDEN}@", content)
        content = _IN_TEXT.sub(lambda m: m[0].replace(m[5], HIDDEN) if is_secret(m[2]) else m[0], content)
        name, equals, _ = content.partition("=")
        if equals and name.startswith("-") and is_secret(name):
            return f"{name}={HIDDEN}"
    return content
