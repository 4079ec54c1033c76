"""A process gives up what it does not need before it reads what a stranger wrote: memory, time, files, network.

Called by children that work for this process (the solver, the templates). It imports nothing of the package and can
therefore be imported by a script that runs under ``python -I``.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import struct
import sys

DENIED = {
    "x86_64": {
        # open, openat, openat2, creat: no file
        2, 257, 437, 85,
        # socket, socketpair, connect, bind, sendto, sendmsg, sendmmsg: no network
        41, 53, 42, 49, 44, 46, 307,
        # clone, fork, vfork, clone3, execve, execveat: no process
        56, 57, 58, 435, 59, 322,
        # kill, tkill, tgkill, ptrace, process_vm_readv, process_vm_writev, pidfd_open: no other process
        62, 200, 234, 101, 310, 311, 434,
        # unlink, unlinkat, rename, renameat, renameat2, mkdir, mkdirat, rmdir, link, linkat, symlink, symlinkat,
        # chmod, fchmodat, chown, lchown, fchownat, truncate, mknod, mknodat, utimensat: nothing changes on disk
        87, 263, 82, 264, 316, 83, 258, 84, 86, 265, 88, 266, 90, 268, 92, 94, 260, 76, 133, 259, 280,
        # mount, umount2, chroot, pivot_root, unshare, setns, bpf, io_uring_setup, userfaultfd, keyctl
        165, 166, 161, 155, 272, 308, 321, 425, 323, 250,
    },
    "aarch64": {
        56, 437, 198, 199, 203, 200, 206, 211, 269, 220, 435, 221, 281, 129, 130, 131, 117, 270, 271, 434,
        35, 38, 276, 34, 37, 36, 53, 54, 45, 33, 88, 40, 39, 51, 41, 97, 268, 280, 425, 282, 219,
    },
}  # fmt: skip
"""Numbers of the system calls that are refused (EPERM), by machine; from asm/unistd.h."""
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""From linux/audit.h."""
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 38, 22, 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
EPERM = 1
BPF_LOAD, BPF_JUMP_IF_EQUAL, BPF_JUMP_IF_GREATER_OR_EQUAL, BPF_RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER, ARCHITECTURE = 0, 4
"""Where struct seccomp_data holds the system call's number and the machine."""
X32 = 0x40000000
"""System calls from here on are those of the x32 interface, which has numbers of its own."""


def confine(mebibytes: int, cpu_seconds: int | None = None) -> bool:
    """Give up memory above a limit, time above a limit (None: the parent watches), new file descriptors and, on Linux
    on a known machine, every system call that opens, changes, starts or connects to anything.

    Args:
        mebibytes: of address space.
        cpu_seconds: of processor time.

    Returns:
        Whether the system calls are refused as well; the limits hold in any case.
    """
    resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if cpu_seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    # stdin, stdout and stderr are open; there is no fourth.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return _filter_system_calls()


def _filter_system_calls() -> bool:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in DENIED:
        return False
    denied = sorted(DENIED[machine])
    # seccomp(2): one classic BPF program; each instruction is (code, jump if true, jump if false, operand).
    program = [
        (BPF_LOAD, 0, 0, ARCHITECTURE),
        (BPF_JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (BPF_RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (BPF_LOAD, 0, 0, NUMBER),
        (BPF_JUMP_IF_GREATER_OR_EQUAL, len(denied) + 1, 0, X32),
        *((BPF_JUMP_IF_EQUAL, len(denied) - index, 0, number) for index, number in enumerate(denied)),
        (BPF_RETURN, 0, 0, SECCOMP_RET_ALLOW),
        (BPF_RETURN, 0, 0, SECCOMP_RET_ERRNO | EPERM),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_void_p(ctypes.addressof(head)), 0, 0) == 0)
