"""The far side of ``code_sandbox``: locks a process in and runs untrusted code there. Standard library only.

A fresh interpreter runs this file, first to build the jail (``main``), then, from inside and without any privilege, to
serve calls of the model's function (``serve``) or to run the trusted tests against it (``judge``). The two sides of a
judgement sit in two jails and exchange plain values only: no code of the model ever runs where the verdict is made.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from decimal import Decimal
from fractions import Fraction

# unshare(2): mount, cgroup, host name, System V IPC, user, process and network namespaces.
NAMESPACES = {"mount": 0x20000, "ipc": 0x8000000, "uts": 0x4000000, "pid": 0x20000000, "net": 0x40000000}
NEW_USER = 0x10000000
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MOUNT_SETATTR = 442  # the same on every architecture
DEATH_SIGNAL, DUMPABLE, SECCOMP, NO_NEW_PRIVILEGES = 1, 4, 22, 38  # prctl(2)
LONGEST = 4_000_000  # bytes of one message between the jails

# Refused with EPERM: new namespaces and mounts (memory without a limit), memory that no limit counts, a look into
# other processes, sockets. {machine: (audit architecture, clone, names -> numbers)}
SYSCALLS = {
    "x86_64": (0xC000003E, 56, {
        "socket": 41, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
        "ptrace": 101, "chroot": 161, "pivot_root": 155, "mount": 165, "umount2": 166,
        "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319, "bpf": 321, "userfaultfd": 323,
    }),
    "aarch64": (0xC00000B7, 220, {
        "socket": 198, "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180,
        "ptrace": 117, "chroot": 51, "pivot_root": 41, "mount": 40, "umount2": 39,
        "add_key": 217, "request_key": 218, "keyctl": 219, "unshare": 97, "perf_event_open": 241, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "memfd_create": 279, "bpf": 280, "userfaultfd": 282,
    }),
}  # fmt: skip
NEWER = {"io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432,
         "mount_setattr": MOUNT_SETATTR, "memfd_secret": 447}  # fmt: skip
CLONE3 = 435


def main() -> int:
    """argv[1]: JSON, see ``code_sandbox._start``; stays until the jailed process has ended."""
    settings = json.loads(sys.argv[1])
    with open(__file__, encoding="utf-8") as own:
        source = own.read()  # once the jail is built, this file is out of reach
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None:
        _prctl(libc, DEATH_SIGNAL, signal.SIGKILL)
    if settings["group"] is not None:
        with open(settings["group"], "w") as group:
            group.write("0")  # this process, and all that it starts
    if not settings["confine"]:
        _locked(settings, libc, None, source)
    uid = _namespaces(libc)
    first = os.fork()
    if first:
        return _exit_code(os.waitpid(first, 0)[1])
    # Process 1 of the namespace: when it ends, the kernel ends all others. No code of the model runs in it.
    _prctl(libc, DEATH_SIGNAL, signal.SIGKILL)
    _mounts(libc, settings)
    inner = os.fork()
    if not inner:
        try:
            _locked(settings, libc, uid, source)
        finally:
            os._exit(125)
    for descriptor in settings["fds"]:
        os.close(descriptor)
    while True:
        pid, status = os.wait()
        if pid == inner:
            os._exit(_exit_code(status))


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _checked(result: int, what: str) -> int:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(libc, option: int, value: int) -> None:
    _checked(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def _namespaces(libc) -> int | None:
    """New namespaces of every kind; returns the user id to change to (as root), None where the kernel maps it away."""
    flags = sum(NAMESPACES.values())
    if os.geteuid() == 0 and libc.unshare(flags) == 0:
        # One id per jail, so that the limit on processes counts this jail's only, and no file belongs to it.
        return 1_600_000_000 + os.getpid()
    user, group = os.geteuid(), os.getegid()
    _checked(libc.unshare(flags | NEW_USER), "unshare")
    for file, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{file}", "w") as handle:
            handle.write(text)
    return None


def _mount(libc, source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    given = [None if text is None else text.encode() for text in (source, target, kind)]
    result = libc.mount(*given, ctypes.c_ulong(flags), None if options is None else options.encode())
    _checked(result, f"mount {target}")


def _mounts(libc, settings: dict) -> None:
    """A file system of its own: the interpreter read-only, a small /jail-work in memory, and nothing else."""
    root = settings["root"]
    _mount(libc, "none", "/", None, RECURSIVE | PRIVATE)
    _mount(libc, "jail", root, "tmpfs", NO_SUID | NO_DEVICES, "size=64k,mode=755")
    for path in settings["mounts"]:
        if os.path.islink(path):
            os.makedirs(root + os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
            continue
        if os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
        else:
            os.makedirs(root + os.path.dirname(path), exist_ok=True)
            open(root + path, "w").close()
        _mount(libc, path, root + path, None, BIND | RECURSIVE)
        if not path.startswith("/dev/"):
            _read_only(libc, root + path)
    os.makedirs(root + "/proc")
    if libc.mount(b"proc", (root + "/proc").encode(), b"proc", ctypes.c_ulong(NO_SUID | NO_DEVICES | 8), None) != 0:
        pass  # some containers forbid it; python does without
    os.makedirs(root + "/jail-work")
    _mount(
        libc,
        "work",
        root + "/jail-work",
        "tmpfs",
        NO_SUID | NO_DEVICES,
        f"size={settings['disk']},nr_inodes=256",
    )
    os.chmod(root + "/jail-work", 0o777)
    os.makedirs(root + "/jail-outside")
    _checked(libc.pivot_root(root.encode(), (root + "/jail-outside").encode()), "pivot_root")
    os.chdir("/")
    _checked(libc.umount2(b"/jail-outside", 2), "umount2")
    os.rmdir("/jail-outside")
    _mount(libc, "none", "/", None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES)
    os.chdir("/jail-work")


def _read_only(libc, path: str) -> None:
    attributes = struct.pack("=QQQQ", READ_ONLY | NO_SUID | NO_DEVICES, 0, 0, 0)
    if libc.syscall(MOUNT_SETATTR, -100, path.encode(), 0x8000, attributes, len(attributes)) == 0:  # with submounts
        return
    if ctypes.get_errno() != errno.ENOSYS:
        _checked(1, f"mount_setattr {path}")
    kept = os.statvfs(path).f_flag & 0x40F  # flags of the outer mount cannot be taken away
    _mount(libc, "none", path, None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES | kept)


def _locked(settings: dict, libc, uid: int | None, source: str) -> None:
    """Limits, no privileges, few system calls; then this process becomes the interpreter that runs the code."""
    for name, value in settings["limits"].items():
        kind = getattr(resource, f"RLIMIT_{name}")
        ceiling = resource.getrlimit(kind)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        if sys.platform == "linux" or name not in ("AS", "NPROC"):  # macOS refuses the one and counts all of a user's
            resource.setrlimit(kind, (value, value))
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if libc is not None:
        _prctl(libc, NO_NEW_PRIVILEGES, 1)
        _filter(libc)
    given = json.dumps({key: settings[key] for key in ("role", "fds", "site")})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # complaints end here: they were about the jail
    os.execve(settings["python"], [settings["python"], "-I", "-S", "-B", "-c", source, given], settings["environment"])


def _filter(libc) -> None:
    """A seccomp filter; none on other machines than those in SYSCALLS, where namespaces and limits must do."""
    if platform.machine() not in SYSCALLS:
        return
    architecture, clone, numbers = SYSCALLS[platform.machine()]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    # (code, jump if true, jump if false, value); jumps count the instructions passed over.
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # the x32 interface has numbers of its own
    for number in (*numbers.values(), *NEWER.values()):
        program += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    program += [(equal, 0, 1, CLONE3), (give, 0, 0, unknown)]  # its flags lie in memory; libc falls back to clone
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, NEW_USER), (give, 0, 0, refuse)]
    program += [(give, 0, 0, allow)]
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    pointer = ctypes.byref(Program(len(program), ctypes.addressof(buffer)))
    _checked(libc.prctl(SECCOMP, ctypes.c_ulong(2), pointer, 0, 0), "seccomp")


# ---- inside


def inside() -> int:
    given = json.loads(sys.argv[1])
    sys.setrecursionlimit(1000)
    return {"serve": serve, "judge": judge}[given["role"]](*given["fds"], given["site"])


def serve(script: int, requests: int, replies: int, site: list[str]) -> int:
    """Runs the model's program, then its function for whoever asks, one JSON line each way."""
    sys.path += site
    with os.fdopen(script) as file:
        program = json.load(file)
    with os.fdopen(requests, "rb") as questions, os.fdopen(replies, "wb") as answers:

        def reply(value: dict) -> None:
            answers.write(json.dumps(value).encode() + b"\n")
            answers.flush()

        names: dict = {}
        try:
            exec(compile(program["program"], "program", "exec"), names)
            function = names[program["entry_point"]]
        except BaseException as error:
            reply({"error": type(error).__name__, "text": _text(error)})
            return 1
        reply({"ready": True})
        for line in questions:
            arguments = [decoded(argument) for argument in json.loads(line)]
            try:
                result = encoded(function(*arguments))
                reply({"value": result, "arguments": [encoded(argument) for argument in arguments]})
            except BaseException as error:
                reply({"error": type(error).__name__, "text": _text(error)})
    return 0


def judge(script: int, requests: int, replies: int, verdict: int, site: list[str]) -> int:
    """Runs the tests of the data set against a stand-in for the model's function, and writes the verdict."""
    with os.fdopen(script) as file:
        program = json.load(file)
    with os.fdopen(requests, "wb") as questions, os.fdopen(replies, "rb") as answers, os.fdopen(verdict, "w") as result:

        def answer() -> dict:
            line = answers.readline(LONGEST)
            if not line.endswith(b"\n"):
                raise Refused("no answer: ended, or too long" if not line else "an answer that is too long")
            found = json.loads(line)
            if "error" in found:
                raise Refused(f"{found['error']}: {found['text']}")
            return found

        def function(*arguments):
            questions.write(json.dumps([encoded(argument) for argument in arguments]).encode() + b"\n")
            questions.flush()
            found = answer()
            for mine, theirs in zip(arguments, found["arguments"], strict=True):  # changed in place?
                if isinstance(mine, list):
                    mine[:] = decoded(theirs)
                elif isinstance(mine, dict):
                    changed = decoded(theirs)
                    mine.clear()
                    mine.update(changed)
            return decoded(found["value"])

        try:
            answer()  # the program itself ran
            names: dict = {}
            exec(program["prompt"], names)  # the helpers that some tests use
            names[program["entry_point"]] = function
            exec(program["test"], names)
            names["check"](function)
            outcome = {"passed": True, "why": "passed"}
        except BaseException as error:
            outcome = {"passed": False, "why": f"{type(error).__name__}: {_text(error)}".rstrip(": ")}
        result.write(json.dumps(outcome))
    return 0


class Refused(Exception):
    """What the model's side said instead of a value."""


def _text(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:200]
    except Exception:
        return ""


class Opaque:
    """A value of a kind that no test can compare with."""


PLAIN = (bool, int, float, str, bytes, complex, tuple, list, set, frozenset, dict, range, Fraction, Decimal)


def encoded(value) -> list:
    """A plain value as [kind, content] for JSON; subclasses as what they are equal to, all else as "opaque"."""
    if value is None:
        return ["none", 0]
    kind = next((kind for kind in PLAIN if isinstance(value, kind)), None)
    if kind is int:
        return ["int", hex(int(value))]  # decimal digits are limited in number
    if kind in (bool, float, str):
        return [kind.__name__, kind(value)]
    if kind is bytes:
        return ["bytes", bytes(value).hex()]
    if kind is complex:
        return ["complex", [value.real, value.imag]]
    if kind in (tuple, list, set, frozenset):
        return [kind.__name__, [encoded(item) for item in value]]
    if kind is dict:
        return ["dict", [[encoded(key), encoded(item)] for key, item in value.items()]]
    if kind is range:
        return ["range", [hex(value.start), hex(value.stop), hex(value.step)]]
    if kind in (Fraction, Decimal):
        return [kind.__name__, str(value)]
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return encoded(value.item())
    if hasattr(value, "__next__"):
        return ["iterator", [encoded(item) for item in value]]
    return ["opaque", 0]


def decoded(pair):
    kind, content = pair
    if kind == "none":
        return None
    if kind == "int":
        return int(content, 16)
    if kind in ("bool", "float", "str"):
        return {"bool": bool, "float": float, "str": str}[kind](content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind in ("tuple", "list", "set", "frozenset"):
        return {"tuple": tuple, "list": list, "set": set, "frozenset": frozenset}[kind](map(decoded, content))
    if kind == "dict":
        return {decoded(key): decoded(item) for key, item in content}
    if kind == "range":
        return range(*(int(number, 16) for number in content))
    if kind in ("Fraction", "Decimal"):
        return {"Fraction": Fraction, "Decimal": Decimal}[kind](content)
    if kind == "iterator":
        return iter([decoded(item) for item in content])
    return Opaque()


if __name__ == "__main__":
    sys.exit(inside() if sys.argv[0] == "-c" else main())
