"""`pctr run`: create a container from an image, run it, pass its exit status through."""

from __future__ import annotations

from pctr.command import Command, Context, Failed, UsageError
from pctr.create import create_container, create_options, remove_container
from pctr.options import REMAINDER

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal

    from pctr.command import Arguments
else:
    import _signal as signal  # see pctr.running


def _arguments(parser: Arguments) -> None:
    parser.add_argument("--rm", action="store_true", help="remove the container when it has ended")
    parser.add_argument("-d", "--detach", action="store_true", help="do not wait for it")
    parser.add_argument("--pull", choices=("missing", "always", "never"), default="missing",
                        help="when to pull the image first (default: missing)")
    parser.add_argument("--log-uri", metavar="URI", help="where output goes: file:///path, binary:///path?key=value")
    parser.add_argument("--null-io", action="store_true", help="throw output away")
    parser.add_argument("--pid-file", metavar="FILE", help="write the process's id there")
    parser.add_argument("--cidfile", metavar="FILE", help="write the container's id there")
    parser.add_argument("--no-sig-proxy", action="store_true", help="do not forward signals")
    create_options(parser)
    parser.add_argument("words", nargs=REMAINDER, metavar="IMAGE [ID [COMMAND …]]",
                        help="image, id of the container (made up when not given) and what to run in it")


def split_words(words: list[str]) -> tuple[str, str, list[str]]:
    """Image, id and command of the positional words."""
    if words and words[0] == "--":
        words = words[1:]
    if not words:
        raise UsageError("which image? see 'pctr run --help'")
    if len(words) > 1 and words[1].startswith("-"):
        raise UsageError(f"option {words[1]!r} comes after the image: options come first, then IMAGE ID COMMAND")
    return words[0], words[1] if len(words) > 1 else "", words[2:]


def _terminated(*_: object) -> None:
    raise Failed("terminated before the container ran", 143)


def run(context: Context) -> int:
    """Run the container of the command line."""
    args = context.args
    reference, name, command = split_words(args.words)
    if args.rm and args.detach:
        raise UsageError("--rm and --detach do not go together")
    if (args.log_uri or args.null_io) and (args.tty and not args.detach):
        raise UsageError("--log-uri and --null-io leave no terminal to show; add --detach")
    signal.signal(signal.SIGTERM, _terminated)
    created = create_container(context, reference, name, command)
    from pctr.running import note, run_task  # loaded already, but for a container without a snapshot

    try:
        note(args.cidfile, created.id)
    except OSError:
        remove_container(context.client, created)
        raise
    status = run_task(context, created, created.mounts, remove=args.rm, remove_unstarted=True)
    if args.detach:
        print(created.id)
    return status


COMMAND = Command(
    "run", "create a container from an image and run it",
    "pctr run --rm docker.io/library/busybox hello echo hello\n"
    "pctr run -it --rm --memory 256m docker.io/library/busybox shell sh\n"
    "pctr run -d --net host docker.io/library/nginx web",
    _arguments, run,
)
