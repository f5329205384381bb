"""Students, generators and paid answers on the Hugging Face Hub: mekd push RUN OWNER/NAME, mekd pull OWNER/NAME."""

import argparse
import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mekd import files
from mekd.errors import UsageError
from mekd.options import Parser

if TYPE_CHECKING:
    from mekd.hub.pack import Item

#: Packages, and the modules in them.
NEEDS = {"huggingface_hub": "huggingface_hub", "safetensors": "safetensors"}


def push(words: Sequence[str]) -> int:
    """The command; returns 0. Raises MekdError where something is missing, refused or not agreed to."""
    options = _push_parser().parse_args(list(words))
    _require_packages()
    from mekd.engine import quote
    from mekd.engine.folder import still
    from mekd.hub import client
    from mekd.hub.pack import about_student, pack

    client.check_name(options.name)
    client.require_login()
    run = Path(options.run)
    with tempfile.TemporaryDirectory() as folder:
        with still(run), _written(f"the files that go up, in {folder},"):
            items, about = pack(run, Path(folder), options.generator, options.store), about_student(run)
        total = sum(item.path.stat().st_size for item in items)
        for item in items:
            print(f"{item.path.stat().st_size:>13,} bytes  {item.name}: {item.what}")
        print(
            f"the files call the teacher {about.get('teacher', 'nothing')}, and name its {about['num_classes']} classes"
        )
        seen = "for everybody to see" if options.public else "private"
        where = f"{client.address()}/{options.name}"
        print(f"{len(items)} files, {total:,} bytes, to {where}, {seen}")
        quote.agree("push them?", options.yes, "nothing was sent")
        url = _commit(items, options.name, options.public, options.update)
    print(f"pushed: {url}")
    return 0


def _commit(items: "Sequence[Item]", name: str, public: bool, update: bool) -> str:
    from huggingface_hub import CommitOperationAdd

    from mekd.hub import client

    hub = client.api()
    with client.told(name, "make" if not update else "show"):
        if not update:
            hub.create_repo(name, private=not public)
        else:
            private = hub.model_info(name).private
            if not private and not public:
                raise UsageError(f"{name} is there for everybody to see: say --public too, or choose another name")
            if private and public:
                raise UsageError(
                    f"{name} is private, and --update leaves it so: leave --public out, or make it public on the hub "
                    "first"
                )
    operations = [CommitOperationAdd(item.name, item.path) for item in items]
    try:
        with client.told(name, "take a commit to"):
            return str(hub.create_commit(name, operations, commit_message="Distilled by mekd").commit_url)
    except client.HubError as error:
        if update:
            raise
        raise client.HubError(f"{error}. {name} was made and is empty: go on with --update") from error


def pull(words: Sequence[str]) -> int:
    """The command; returns 0. Raises MekdError where there is nothing of ours, or it is damaged."""
    options = _pull_parser().parse_args(list(words))
    _require_packages()
    from mekd.hub import client
    from mekd.hub.unpack import unpack, wanted

    client.check_name(options.name)
    out = Path(options.out or options.name.rpartition("/")[2])
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out is {files.shown(out)!r}, which is there already; choose another folder")
    hub = client.api()
    with client.told(options.name, "show"):
        info = hub.model_info(options.name, revision=options.revision, files_metadata=True)
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
    names, others = wanted(options.name, list(sizes))
    print(f"{len(names)} files, {sum(sizes[name] for name in names):,} bytes, from {client.address()}/{options.name}")
    if others:
        print(f"left out, as mekd pushes none such: {', '.join(map(ascii, others[:5]))}{', ...' if others[5:] else ''}")
    with _written(f"--out is {files.shown(out)!r}; it"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            for name in names:
                with client.told(options.name, "give"):
                    hub.hf_hub_download(options.name, name, revision=info.sha, local_dir=Path(folder, "down"))
            made = Path(folder, "made")
            lines = unpack(Path(folder, "down"), names, made)
            if out.exists():
                out.rmdir()  # another pull may have filled it meanwhile
            made.rename(out)
    for line in lines:
        print(line.replace("FOLDER", str(out)))
    return 0


@contextlib.contextmanager
def _written(what: str) -> Iterator[None]:
    """Make WriteError of what the system says while files are made; told has made its own of the network's."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise files.WriteError(
            f"{what} could not be made ({error}), and nothing of it is left: free some space, or choose another folder"
        ) from error


def _require_packages() -> None:
    if missing := [package for package, name in NEEDS.items() if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{' and '.join(missing)} cannot be imported: pip install 'mekd[hub]'")


def _push_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mekd push", allow_abbrev=False,
        description="Put a run's student on the Hugging Face Hub, after you agreed to what goes up. Private unless "
        "--public says otherwise. No private image, ledger, log, setting or code is ever among it.",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository that is made")
    add = parser.add_argument
    add("--generator", action="store_true", help="its generator too, which learned from the private images")
    add("--store", action="store_true", help="the paid answers too, with the generated images that they are answers to")
    add("--public", action="store_true", help="for everybody to see")
    add("--update", action="store_true", help="add to a repository that is there")
    add("--yes", action="store_true", help="agree to what goes up where nobody can be asked")
    return parser


def _pull_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mekd pull", allow_abbrev=False,
        description="Fetch what `mekd push` put on the Hugging Face Hub, and check it. No code comes with it.",
    )  # fmt: skip
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository")
    parser.add_argument("--out", metavar="FOLDER", help="where it goes, a new folder (NAME)")
    parser.add_argument("--revision", metavar="REV", help="a commit, branch or tag; its newest, unless given")
    return parser
