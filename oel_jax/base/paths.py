"""Paths as a user writes them: files and directories of this machine, never URLs.

`Path("gs://bucket/run")` is, without a word, a directory named "gs:" below the current one. Every
text that is to become a path passes through here: flags of all commands, config fields, arguments
of public functions. Imports no JAX.
"""

import argparse
import os
import re
from pathlib import Path

from oel_jax.base.errors import UserError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)")
# A URL that went through `Path` has lost a slash: "gs:/bucket". Then only these names tell it from
# a directory whose name ends in a colon.
_SCHEMES = frozenset(
    "gs gcs s3 s3a r2 az abfs abfss wasb wasbs adl hdfs oss cos hf file http https ftp sftp ssh "
    "scp git dbfs webdav memory mlflow wandb".split()
)


def scheme(text: str | os.PathLike) -> str | None:
    """'gs' for 'gs://bucket/x' and for 'gs:/bucket/x'; None for a path of this machine.

    A colon alone makes no URL: 'runs/a:b', 'nano:tiny' and './gs:/x' are none.
    """
    found = _URL.match(os.fspath(text))
    if found is None:
        return None
    name = found[1].lower()
    return name if found[2] == "//" or name in _SCHEMES else None


def wrong(text: str | os.PathLike) -> str | None:
    """What a text that is to be a path must be, or None if it can be one."""
    text, kind = os.fspath(text), scheme(text)
    if not text.strip():
        return "a path, not an empty text"
    rest = _URL.sub("", text, count=1)
    if kind == "file":
        return f"a path, not a URL: leave out file://, as in /{rest.lstrip('/')}"
    if kind == "hf" or (kind and re.match(r"(www\.)?(huggingface\.co|hf\.co)/", rest)):
        return "a path on this machine or, for a model, its Hugging Face id (owner/name); not a URL"
    if kind:
        return (
            f"a path on this machine, not a URL ({kind}://): copy the files here, or mount what "
            "holds them and give the directory of the mount"
        )
    if re.match(r"~(/|$)", text) and os.path.expanduser(text) == text:
        return "a path without ~, since this user has no home directory (HOME is not set)"
    return None


def local(text: str | os.PathLike, what: str) -> Path:
    """The path that a text names, with a leading ~ replaced by the home directory.

    Args:
      what: what the message calls it, 'config.model.path' or '--workdir'.

    Raises:
      UserError: it is a URL or empty.
    """
    must = wrong(text)
    if must:
        raise UserError(f"{what} is {os.fspath(text)!r}; it must be {must}")
    return Path(os.path.expanduser(os.fspath(text)))


def argument(text: str) -> Path:
    """`type=` of every argparse flag that takes a path."""
    must = wrong(text)
    if must:
        raise argparse.ArgumentTypeError(f"{text!r} must be {must}")
    return Path(os.path.expanduser(text))
