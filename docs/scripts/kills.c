/* Loaded before libc (LD_PRELOAD) by kills.py: counts the operations of one process that change files below one folder,
   and kills the process before one of them, or lets the disk be full from there on. Libraries in C++ and Rust pass here
   as well as Python; what is written through mmap does not. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { RECORD, KILL, FULL };

static char root[PATH_MAX];
static pid_t process;
static int mode, log_fd = -1;
static long count, target;

/* From now on in this process only. Operation number `number` (from 1) is the one that is hit; `log` gets a line each. */
void kills_arm(const char *folder, int how, long number, int log) {
    strncpy(root, folder, sizeof root - 1);
    mode = how, target = number, log_fd = log, count = 0, process = getpid();
}

static void absolute(int dir, const char *path, char *out) {
    char base[PATH_MAX] = "", link[64];
    if (path[0] != '/') {
        if (dir == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) base[0] = 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t n = readlink(link, base, sizeof base - 1);
            base[n < 0 ? 0 : n] = 0;
        }
    }
    snprintf(out, PATH_MAX, "%s%s%s", base, base[0] && path[0] ? "/" : "", path);
}

/* -1 with errno where the operation has to fail. */
static int before(const char *name, int dir, const char *path, int needs_room) {
    char where[PATH_MAX], line[PATH_MAX + 64];
    int saved = errno;
    if (!process || getpid() != process) return 0;
    absolute(dir, path, where);
    size_t length = strlen(root);
    if (strncmp(where, root, length) || where[length] != '/') return errno = saved, 0;
    count++;
    if (log_fd >= 0) {
        int n = snprintf(line, sizeof line, "%s %s\n", name, where + length + 1);
        syscall(SYS_write, log_fd, line, n);
    }
    if (mode == KILL && count == target) kill(process, SIGKILL);
    if (mode == FULL && count >= target && needs_room) return errno = ENOSPC, -1;
    return errno = saved, 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CHANGES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define MODE_ARG(flags) mode_t m = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); m = va_arg(a, int); va_end(a); }

#define OPEN(name) int name(const char *path, int flags, ...) { MODE_ARG(flags) REAL(name); \
    if (CHANGES(flags) && before("open", AT_FDCWD, path, flags & O_CREAT)) return -1; return real(path, flags, m); }
OPEN(open)
OPEN(open64)
#define OPENAT(name) int name(int dir, const char *path, int flags, ...) { MODE_ARG(flags) REAL(name); \
    if (CHANGES(flags) && before("open", dir, path, flags & O_CREAT)) return -1; return real(dir, path, flags, m); }
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name) FILE *name(const char *path, const char *how) { REAL(name); \
    if (strpbrk(how, "wa+") && before("open", AT_FDCWD, path, 1)) return NULL; return real(path, how); }
FOPEN(fopen)
FOPEN(fopen64)

#define FD(type, name, room, params, args) type name params { REAL(name); if (before(#name, fd, "", room)) return -1; return real args; }
FD(ssize_t, write, 1, (int fd, const void *data, size_t n), (fd, data, n))
FD(ssize_t, pwrite, 1, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
FD(ssize_t, pwrite64, 1, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at))
FD(ssize_t, writev, 1, (int fd, const struct iovec *parts, int n), (fd, parts, n))
FD(int, fsync, 1, (int fd), (fd))
FD(int, fdatasync, 1, (int fd), (fd))
FD(int, ftruncate, 1, (int fd, off_t length), (fd, length))
FD(int, ftruncate64, 1, (int fd, off64_t length), (fd, length))
FD(int, fchmod, 0, (int fd, mode_t m), (fd, m))

#define PATH(name, dir, path, room, params, args) int name params { REAL(name); if (before(#name, dir, path, room)) return -1; return real args; }
PATH(rename, AT_FDCWD, to, 0, (const char *from, const char *to), (from, to))
PATH(renameat, t, to, 0, (int f, const char *from, int t, const char *to), (f, from, t, to))
PATH(renameat2, t, to, 0, (int f, const char *from, int t, const char *to, unsigned flags), (f, from, t, to, flags))
PATH(unlink, AT_FDCWD, path, 0, (const char *path), (path))
PATH(unlinkat, dir, path, 0, (int dir, const char *path, int flags), (dir, path, flags))
PATH(remove, AT_FDCWD, path, 0, (const char *path), (path))
PATH(rmdir, AT_FDCWD, path, 0, (const char *path), (path))
PATH(mkdir, AT_FDCWD, path, 1, (const char *path, mode_t m), (path, m))
PATH(mkdirat, dir, path, 1, (int dir, const char *path, mode_t m), (dir, path, m))
PATH(chmod, AT_FDCWD, path, 0, (const char *path, mode_t m), (path, m))
PATH(link, AT_FDCWD, to, 1, (const char *from, const char *to), (from, to))
PATH(symlink, AT_FDCWD, to, 1, (const char *from, const char *to), (from, to))
PATH(truncate, AT_FDCWD, path, 1, (const char *path, off_t length), (path, length))
