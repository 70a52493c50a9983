"""`python -m maxlm.serve --run RUN_DIR`: answer requests over HTTP, as OpenAI's server does."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import importlib.util
from pathlib import Path
from typing import Annotated

import tyro

from maxlm.config import ChosenModel, DocumentsConfig, EngineConfig, UserError
from maxlm.config.cli import parse, run_command
from maxlm.config.errors import pip_install
from maxlm.config.fields import NotNegative, PathName, Positive, Range, config
from maxlm.serving.other_servers import OtherServer, check, command

_DESCRIPTION = """Answer requests over HTTP, as OpenAI's server does; a page to chat with stands at the address itself.

It ends at SIGTERM or Ctrl-C, when what is being answered is answered. Exit code 2: one line says what was wrong."""
_KEY = "MAXLM_API_KEY"
_PACKAGES = ("uvicorn", "starlette", "pydantic", "prometheus_client", "jinja2", "llguidance")


@config("--")
class ServeOptions:
    """Which model, where, and for how many at once."""

    model: Annotated[ChosenModel, tyro.conf.arg(name="")]
    """Which model."""
    name: str | None = None
    """What requests call the model; None: the name of its folder or file."""
    adapter: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=DIR")] = ()
    """An adapter of the model, which requests ask for by the name: a run folder, or a folder of peft; or a sum,
    NAME=0.7*DIR+0.3*DIR. As often as there are adapters."""
    host: str = "127.0.0.1"
    """Address to listen at. By default only programs on this machine can ask; 0.0.0.0: all that reach it."""
    port: Annotated[int, Range(ge=0, le=65535, note="0 takes any that is free")] = 8000
    """TCP port."""
    api_key: str | None = None
    """What clients must send. Other users of this machine can see it here, but not in the environment's
    MAXLM_API_KEY."""
    allow_host: tuple[str, ...] = ()
    """More names by which clients may call a server that listens on this machine alone."""
    embeddings: bool = False
    """Give vectors of texts too; the parameters then stay in memory in float32, beside the engine's."""
    documents: Annotated[DocumentsConfig, tyro.conf.arg(name="")] = DocumentsConfig()
    """What conversations are answered from."""
    preferences: PathName | None = None
    """File for rankings of answers, which the page then asks for: a line of JSON is added for each pair."""
    max_body_mb: Positive[int] = 32
    """Largest request, in MiB."""
    drain_s: NotNegative[float] = 30.0
    """Seconds that answers have when the server is told to end."""
    engine: EngineConfig = EngineConfig()
    """How many texts at once, in how much memory."""
    print: OtherServer | None = None
    """Serve nothing: print the command by which this other server would serve the folder of --hf."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise UserError("--api_key '' is empty; leave it out, or use a key")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: the model or an option does not fit, a package is missing, or the address is taken.
    """
    options = parse(ServeOptions, argv, prog="python -m maxlm.serve", description=_DESCRIPTION, flags=True)
    if options.print is not None:
        print(_other_command(options.print, options))
        return
    missing = [name.replace("_", "-") for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}; {pip_install(*missing)}")

    from maxlm.compile_cache import enable_compilation_cache  # these import jax: --help stays instant
    from maxlm.hub.adapted import load_adapters
    from maxlm.hub.models import load_chosen, load_draft
    from maxlm.serving.app import Service
    from maxlm.serving.listening import DrainingServer, bind_address, is_loopback
    from maxlm.serving.loading import serve_model
    from maxlm.serving.preferences import Preferences

    loopback = is_loopback(options.host)
    hosts = ("localhost", "127.0.0.1", "::1", options.host, *options.allow_host) if loopback else ()
    listener = bind_address(options.host, options.port)  # before a model is loaded for nothing
    preferences = None if options.preferences is None else Preferences(Path(options.preferences))
    enable_compilation_cache()
    name = _name(options)
    print(f"loading {name} and compiling its programs; clients are answered when a line says where", file=sys.stderr)
    run = load_chosen(options.model)
    models = serve_model(
        run,
        name,
        options.engine,
        options.model.weights,
        embeddings=options.embeddings,
        draft=load_draft(options.engine.speculation),
        documents=options.documents,
        adapters=load_adapters(options.model, options.adapter),
    )
    key = options.api_key or os.environ.get(_KEY) or None
    service = Service(
        models=models,
        api_key=key,
        hosts=tuple(map(str.lower, hosts)),
        max_body=options.max_body_mb << 20,
        preferences=preferences,
    )
    port = listener.getsockname()[1]
    address = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{port}"

    def ready() -> None:
        print(
            f"{' and '.join(models)} at {address}, {'with' if key else 'without'} an API key; Ctrl-C ends it",
            flush=True,
        )
        if not loopback:
            keyless = "" if key else f", and all of them can ask, as there is no key; set {_KEY}"
            print(f"other machines can reach {options.host}{keyless}", file=sys.stderr, flush=True)

    DrainingServer(service, drain_s=options.drain_s, ready=ready).run(sockets=[listener])


def _name(options: ServeOptions) -> str:
    return options.name or Path(options.model.place).resolve().stem


def _other_command(server: OtherServer, options: ServeOptions) -> str:
    check(server, options.model)

    from maxlm.hub.folder import open_folder

    return command(
        server,
        options.model,
        max_seq_len=open_folder(Path(options.model.place)).model.max_seq_len,
        name=_name(options),
        host=options.host,
        port=options.port,
        slots=options.engine.slots,
        key=_KEY if options.api_key or os.environ.get(_KEY) else None,
    )


if __name__ == "__main__":
    run_command(main)
