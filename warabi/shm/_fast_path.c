/* A guest's accesses.  _fast_path.pyi documents the two classes and their methods,
 * warabi/target/leases.py the protocol.
 *
 * The GIL guards everything here except the bytes that are copied and the memory that is shared
 * with other processes.  It is released for system calls that may wait for stable storage and for
 * large copies.  Meanwhile a reference is held to everything in use: the grant (and with it the
 * descriptor or mapping), the caller's buffer, and, by the caller, the FastPath itself.  Python
 * code may run where a region is hashed or compared, where a buffer is acquired or released, and in
 * signal handlers.  It may change anything in a FastPath, so nothing that was read before it is
 * used after it.
 *
 * Memory ordering.  The table is written by another process, which changes a version and then
 * calls membarrier(2): a full barrier in this thread at some point between two of its
 * instructions.  For a store that precedes a load here it therefore suffices that the compiler
 * does not reorder the two (`ordered`): either the load comes after the barrier, and returns the
 * new version, or the store came before it, and is visible to the caller of membarrier.  All
 * other pairs are ordered by acquire and release.
 */

#define PY_SSIZE_T_CLEAN
/* The stable ABI of Python 3.11: one build for every later one. */
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifdef Py_GIL_DISABLED
#error "the free hazard slots are guarded by the GIL"
#endif
_Static_assert(sizeof(off_t) == 8, "offsets have 64 bits");

#define LARGE (256 * 1024)  /* bytes from which on releasing the lock costs less than it gives */
#define RECENT 4096         /* a power of two */
#define RESOLUTION 10000000 /* ns: that of the coarsest clock */

/* A compiler barrier: loads and stores are not moved across it. */
#define ordered() __atomic_signal_fence(__ATOMIC_SEQ_CST)

/* Grant */

typedef struct {
    PyObject_HEAD
    Py_ssize_t index;
    uint64_t version;
    int64_t room;
    int fd;
    char slow;        /* the file cannot be read without maybe waiting */
    char owns;        /* the file is closed with the grant */
    int64_t start;    /* where the region begins in the file or the memory */
    Py_buffer view;   /* without an `obj` when there is none */
    PyObject *keeper; /* of the memory that `view` shows, or of the file */
} Grant;

static int grant_init(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"index", "version", "room", "fd", "keeper", "view", "start", NULL};
    Grant *self = (Grant *)object;
    PyObject *version, *keeper = Py_None, *view = NULL;
    Py_ssize_t index;
    long long room, start = 0;
    int fd = -1;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "nO!L|iOOL:Grant", names, &index, &PyLong_Type,
                                     &version, &room, &fd, &keeper, &view, &start))
        return -1;
    if (self->keeper != NULL) {
        PyErr_SetString(PyExc_TypeError, "a Grant does not change");
        return -1;
    }
    uint64_t word = PyLong_AsUnsignedLongLongMask(version);
    if (word == (uint64_t)-1 && PyErr_Occurred())
        return -1;
    if (view != NULL && PyObject_GetBuffer(view, &self->view, PyBUF_SIMPLE) < 0)
        return -1;
    /* Whatever the table says, nothing beyond the view is touched. */
    if (start < 0 || room > INT64_MAX - start ||
        (fd < 0 && room > (view == NULL ? 0 : self->view.len) - start)) {
        PyBuffer_Release(&self->view);
        PyErr_SetString(PyExc_ValueError, "Grant: the capacity exceeds the mapping");
        return -1;
    }
    self->index = index;
    self->version = word;
    self->room = room;
    self->fd = fd;
    self->owns = fd >= 0 && keeper == Py_None;
    self->start = start;
    self->keeper = Py_NewRef(keeper);
    return 0;
}

static PyObject *grant_new(PyTypeObject *type, PyObject *Py_UNUSED(args),
                           PyObject *Py_UNUSED(keywords))
{
    Grant *self = (Grant *)PyType_GenericAlloc(type, 0);
    if (self != NULL)
        self->fd = -1; /* until it is known; all else is 0 */
    return (PyObject *)self;
}

static void grant_dealloc(PyObject *object)
{
    Grant *self = (Grant *)object;
    PyTypeObject *type = Py_TYPE(object);

    PyBuffer_Release(&self->view);
    Py_CLEAR(self->keeper);
    if (self->owns) {
        Py_BEGIN_ALLOW_THREADS /* the last one to close an erased file gives its blocks back */
        close(self->fd);
        Py_END_ALLOW_THREADS
    }
    PyObject_Free(object);
    Py_DECREF(type);
}

static PyMemberDef grant_members[] = {
    {"index", T_PYSSIZET, offsetof(Grant, index), READONLY, NULL},
    {"version", T_ULONGLONG, offsetof(Grant, version), READONLY, NULL},
    {"room", T_LONGLONG, offsetof(Grant, room), READONLY, NULL},
    {"fd", T_INT, offsetof(Grant, fd), READONLY, NULL},
    {"owns", T_BOOL, offsetof(Grant, owns), READONLY, NULL},
    {"start", T_LONGLONG, offsetof(Grant, start), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot grant_slots[] = {
    {Py_tp_doc, "A region that may be accessed."},
    {Py_tp_new, grant_new},
    {Py_tp_init, grant_init},
    {Py_tp_dealloc, grant_dealloc},
    {Py_tp_members, grant_members},
    {0, NULL},
};

static PyType_Spec grant_spec = {
    .name = "warabi.shm._fast_path.Grant",
    .basicsize = sizeof(Grant),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = grant_slots,
};

/* FastPath */

enum { LIFE, TABLE, WRITE_TIMES, HAZARDS, MAPPINGS };

typedef struct {
    PyObject_HEAD
    PyTypeObject *grant_type;
    PyObject *grants; /* a dict, the last thing that is set: before, and after the collector
                         cleared it, nothing can be accessed */
    PyObject *words;  /* the table, for code in Python */
    PyObject *mappings[MAPPINGS];
    Py_buffer views[MAPPINGS];
    const uint32_t *life;
    const uint64_t *table;
    uint64_t *write_times;
    uint64_t *hazards;
    size_t entries;
    uint32_t alive;
    int slots;
    uint64_t free; /* a bit for each hazard slot */
    char usable;
    char writable;
    char in_memory;          /* files are: reading does not wait for a device */
    uint64_t writes;         /* that were marked */
    uint64_t recent[RECENT]; /* a ring of their write_times */
} FastPath;

static struct PyModuleDef module_def;

/* The type of this module's grants, a borrowed reference, by the type of a FastPath, which may be a
 * class derived from it.  PyType_GetModuleByDef() is in the stable ABI only since Python 3.13. */
static PyTypeObject *grant_type_of(PyTypeObject *type)
{
    for (; type != NULL; type = PyType_GetSlot(type, Py_tp_base)) {
        PyObject *module = PyType_GetModule(type);
        if (module == NULL)
            PyErr_Clear(); /* a class that is written in Python */
        else if (PyModule_GetDef(module) == &module_def)
            return *(PyTypeObject **)PyModule_GetState(module);
    }
    PyErr_SetString(PyExc_TypeError, "this is no type of a FastPath");
    return NULL;
}

static int path_init(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"life", "table", "write_times", "hazards",
                            "word", "alive", "writable",    NULL};
    FastPath *self = (FastPath *)object;
    PyObject *mappings[MAPPINGS];
    Py_ssize_t word;
    unsigned int alive;
    int writable;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOnIp:FastPath", names, &mappings[LIFE],
                                     &mappings[TABLE], &mappings[WRITE_TIMES], &mappings[HAZARDS],
                                     &word, &alive, &writable))
        return -1;
    if (self->mappings[0] != NULL) {
        PyErr_SetString(PyExc_TypeError, "a FastPath is made once");
        return -1;
    }
    PyTypeObject *grant_type = grant_type_of(Py_TYPE(object));
    if (grant_type == NULL)
        return -1;
    self->grant_type = (PyTypeObject *)Py_NewRef((PyObject *)grant_type);
    for (int i = 0; i < MAPPINGS; i++)
        self->mappings[i] = Py_NewRef(mappings[i]);
    for (int i = 0; i < MAPPINGS; i++) {
        PyObject *view = PyObject_GetAttrString(mappings[i], "view");
        if (view == NULL)
            return -1;
        int flags = i == HAZARDS || (i == WRITE_TIMES && writable) ? PyBUF_WRITABLE : PyBUF_SIMPLE;
        int got = PyObject_GetBuffer(view, &self->views[i], flags);
        if (got == 0 && i == TABLE)
            self->words = PyObject_CallMethod(view, "cast", "s", "Q");
        Py_DECREF(view);
        if (got < 0 || (i == TABLE && self->words == NULL))
            return -1;
        if ((uintptr_t)self->views[i].buf % 8 != 0) {
            PyErr_SetString(PyExc_ValueError, "FastPath: memory that is not aligned");
            return -1;
        }
    }
    self->entries = (size_t)self->views[WRITE_TIMES].len / 8;
    Py_ssize_t slots = self->views[HAZARDS].len / 8;
    if (word < 0 || word >= self->views[LIFE].len / 4 || slots < 1 || slots > 64 ||
        self->entries < 1 || (size_t)self->views[TABLE].len / 16 < self->entries) {
        PyErr_SetString(PyExc_ValueError, "FastPath: memory of a size that cannot be");
        return -1;
    }
    self->life = (const uint32_t *)self->views[LIFE].buf + word;
    self->table = self->views[TABLE].buf;
    self->write_times = self->views[WRITE_TIMES].buf;
    self->hazards = self->views[HAZARDS].buf;
    self->alive = alive;
    self->slots = (int)slots;
    self->free = ~(uint64_t)0 >> (64 - slots);
    self->writable = (char)writable;
    self->usable = 1;
    self->in_memory = 0;
    self->grants = PyDict_New();
    return self->grants == NULL ? -1 : 0;
}

/* The mappings, which hold no references, are not visited: the collector would unmap memory in a
 * cycle while an object of that cycle may still call a method here. */
static int path_traverse(PyObject *object, visitproc visit, void *arg)
{
    FastPath *self = (FastPath *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->grant_type);
    Py_VISIT(self->grants);
    return 0;
}

static int path_clear(PyObject *object)
{
    Py_CLEAR(((FastPath *)object)->grants);
    return 0;
}

static void path_dealloc(PyObject *object)
{
    FastPath *self = (FastPath *)object;
    PyTypeObject *type = Py_TYPE(object);

    PyObject_GC_UnTrack(self);
    path_clear(object);
    Py_CLEAR(self->words);
    for (int i = 0; i < MAPPINGS; i++) {
        PyBuffer_Release(&self->views[i]);
        Py_CLEAR(self->mappings[i]);
    }
    Py_CLEAR(self->grant_type);
    PyObject_GC_Del(object);
    Py_DECREF(type);
}

static bool living(const FastPath *self)
{
    return self->grants != NULL && __atomic_load_n(self->life, __ATOMIC_RELAXED) == self->alive;
}

/* The grant of a region, a new reference; NULL when there is none that is good for anything, or
 * with an exception of the region's own. */
static Grant *find(FastPath *self, PyObject *region)
{
    if (!living(self))
        return NULL;
    PyObject *found = PyDict_GetItemWithError(self->grants, region);
    if (found == NULL || !Py_IS_TYPE(found, self->grant_type))
        return NULL;
    Grant *grant = (Grant *)found;
    if (grant->room < 0 || (size_t)grant->index >= self->entries)
        return NULL;
    return (Grant *)Py_NewRef(found);
}

/* An offset, -1 for one that cannot be within a region, -2 with an exception. */
static int64_t offset_of(PyObject *object)
{
    int overflow;
    int64_t offset = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (offset == -1 && !overflow && PyErr_Occurred())
        return -2;
    return overflow || offset < 0 ? -1 : offset;
}

static bool counted(const char *name, Py_ssize_t count, Py_ssize_t least, Py_ssize_t most)
{
    if (count >= least && count <= most)
        return true;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd to %zd arguments, got %zd", name, least, most,
                 count);
    return false;
}

/* An argument that is a switch; -1 with an exception. */
static int given(PyObject *const *args, Py_ssize_t count, Py_ssize_t which, int otherwise)
{
    return which < count ? PyObject_IsTrue(args[which]) : otherwise;
}

/* Are these unchecked arguments what they should be, beyond doubt?  Then the buffer is held.  If
 * not, the Python code that checks them raises: no exception is set here, except one like
 * KeyboardInterrupt. */
static bool plain(PyObject *const *args, Py_buffer *buffer, int flags)
{
    if (!PyBytes_Check(args[0]) || PyBytes_Size(args[0]) != 16 || !PyLong_CheckExact(args[1]))
        return false;
    if (PyObject_GetBuffer(args[2], buffer, flags | PyBUF_ND | PyBUF_FORMAT) < 0) {
        if (PyErr_ExceptionMatches(PyExc_Exception))
            PyErr_Clear();
        return false;
    }
    if (buffer->format != NULL && strchr(buffer->format, 'O') != NULL) { /* references, maybe */
        PyBuffer_Release(buffer);
        return false;
    }
    return true;
}

/* The two words of a grant's entry.  Acquire: what is looked at afterwards is no older. */
static uint64_t version_of(const FastPath *self, const Grant *grant)
{
    return __atomic_load_n(&self->table[2 * grant->index], __ATOMIC_ACQUIRE);
}

static int64_t size_of(const FastPath *self, const Grant *grant)
{
    uint64_t size = __atomic_load_n(&self->table[2 * grant->index + 1], __ATOMIC_ACQUIRE);
    return size > INT64_MAX ? INT64_MAX : (int64_t)size;
}

/* Claim a hazard slot and store the grant's region in it; -1 if all slots are in use by other
 * threads. */
static int enter(FastPath *self, const Grant *grant)
{
    if (self->free == 0)
        return -1;
    int slot = __builtin_ctzll(self->free);
    self->free &= self->free - 1;
    __atomic_store_n(&self->hazards[slot], (uint64_t)grant->index, __ATOMIC_RELAXED);
    ordered();
    return slot;
}

/* The second check, after the bytes were copied: is the grant still valid? */
static bool still(const FastPath *self, const Grant *grant)
{
    ordered();                               /* what was stored: see the top of the file */
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* what was loaded */
    return version_of(self, grant) == grant->version;
}

/* Release: a process that sees the hazard slot empty sees everything done while it was set. */
static void leave(FastPath *self, int slot)
{
    __atomic_store_n(&self->hazards[slot], 0, __ATOMIC_RELEASE);
    self->free |= (uint64_t)1 << slot;
}

static void copy(void *to, const void *from, size_t size)
{
    if (size == 0) /* there may be no address then */
        return;
    if (size < LARGE) {
        memcpy(to, from, size);
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    memcpy(to, from, size);
    Py_END_ALLOW_THREADS
}

enum way { WRITE, READ, READ_AT_ONCE }; /* the last one fails where it would have to wait */

static ssize_t system_call(enum way way, int fd, char *bytes, size_t size, off_t offset)
{
    struct iovec piece = {bytes, size};
    bool hold = way == READ_AT_ONCE && size < LARGE; /* it does not block */
    PyThreadState *saved = hold ? NULL : PyEval_SaveThread();
    ssize_t count = way == WRITE  ? pwrite(fd, bytes, size, offset)
                    : way == READ ? pread(fd, bytes, size, offset)
                                  : preadv2(fd, &piece, 1, offset, RWF_NOWAIT);
    int number = errno;
    if (saved != NULL)
        PyEval_RestoreThread(saved);
    errno = number;
    return count;
}

/* RAISED with an exception of a signal's handler, FAILED with `errno`. */
enum result { DONE, FAILED, RAISED };

/* Move all of `size` bytes; `moved` counts those that were, whatever the result. */
static enum result transfer(enum way way, int fd, char *bytes, int64_t size, int64_t offset,
                            int64_t *moved)
{
    while (size > 0) {
        ssize_t count = system_call(way, fd, bytes, (size_t)size, offset);
        if (count > 0) {
            bytes += count;
            size -= count;
            offset += count;
            *moved += count;
        } else if (count == 0 || errno != EINTR) {
            errno = count == 0 ? EIO : errno; /* 0: the file was cut off */
            return FAILED;
        } else if (PyErr_CheckSignals() < 0) {
            return RAISED;
        }
    }
    return DONE;
}

/* A reader that released the GIL waits some milliseconds until a busy thread gives it back: far
 * longer than a copy from memory, which is nearly always the case. */
static enum result read_file(Grant *grant, char *bytes, int64_t size, int64_t offset, bool wait)
{
    int64_t moved = 0;
    if (!wait || (!grant->slow && size < LARGE)) {
        enum result result = transfer(READ_AT_ONCE, grant->fd, bytes, size, offset, &moved);
        if (!wait || result != FAILED)
            return result;
        grant->slow = errno == EOPNOTSUPP;
    }
    return transfer(READ, grant->fd, bytes, size, offset, &moved);
}

/* Set the region's last-write time.  The provider reads mark 0 first, and the other write_times
 * only if it has changed: so the region's mark is stored first, and a reader that acquires the new
 * mark 0 sees it.  Both are later than mark 0 was, even if the clock returns the same time again;
 * otherwise the provider could mistake this write for one that it has seen.  A mark 0 far ahead
 * is ignored. */
static void mark(FastPath *self, const Grant *grant)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t time = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
    uint64_t last = __atomic_load_n(&self->write_times[0], __ATOMIC_RELAXED);
    if (last - time < RESOLUTION)
        time = last + 1;
    __atomic_store_n(&self->write_times[grant->index], time, __ATOMIC_RELAXED);
    __atomic_store_n(&self->write_times[0], time, __ATOMIC_RELEASE);
    self->recent[self->writes++ % RECENT] = time;
}

/* Have Python code drop a grant that is no longer valid. */
static void drop(FastPath *self, PyObject *region, Grant *grant)
{
    Py_XDECREF(PyObject_CallMethod((PyObject *)self, "_drop", "OO", region, grant));
}

/* Raise the exception that Python code returns for a storage error. */
static void raise_failure(FastPath *self, PyObject *region, int number)
{
    PyObject *cause = PyObject_CallFunction(PyExc_OSError, "is", number, strerror(number));
    if (cause == NULL)
        return;
    PyObject *failure = PyObject_CallMethod((PyObject *)self, "_failure", "OO", region, cause);
    if (failure != NULL && !PyExceptionInstance_Check(failure)) {
        PyErr_SetString(PyExc_TypeError, "_failure() returned no exception");
        Py_DECREF(failure);
    } else if (failure != NULL) {
        PyException_SetCause(failure, Py_NewRef(cause));
        PyErr_SetObject((PyObject *)Py_TYPE(failure), failure);
        Py_DECREF(failure);
    }
    Py_DECREF(cause);
}

/* Write.  Returns whether it was done, -1 with an exception; the buffer is released. */
static int store(FastPath *self, PyObject *region, int64_t offset, Py_buffer *data)
{
    enum result result = FAILED;
    int slot, number = 0;
    int64_t moved = 0;
    Grant *grant = find(self, region);
    if (grant == NULL || offset < 0 || !self->writable || grant->view.readonly ||
        data->len > grant->room - offset || (slot = enter(self, grant)) < 0) {
        Py_XDECREF((PyObject *)grant);
        PyBuffer_Release(data);
        return PyErr_Occurred() ? -1 : false;
    }
    if (self->usable && version_of(self, grant) == grant->version &&
        data->len <= size_of(self, grant) - offset) {
        if (grant->fd < 0) {
            copy((char *)grant->view.buf + grant->start + offset, data->buf, (size_t)data->len);
            moved = data->len;
            result = DONE;
        } else {
            off_t place = grant->start + offset;
            result = transfer(WRITE, grant->fd, data->buf, data->len, place, &moved);
            number = result == FAILED ? errno : 0;
        }
        if (result == DONE || moved > 0) /* also a part of what then failed */
            mark(self, grant);
    }
    bool good = still(self, grant);
    leave(self, slot);
    if (number != 0)
        raise_failure(self, region, number);
    else if (result != RAISED && !good)
        drop(self, region, grant);
    Py_DECREF(grant);
    PyBuffer_Release(data);
    return PyErr_Occurred() ? -1 : result == DONE && good;
}

/* Read.  Returns how many bytes, -1 when it was not done, -2 with an exception; the buffer is
 * released. */
static int64_t load(FastPath *self, PyObject *region, int64_t offset, Py_buffer *place, bool wait,
                    bool fewer)
{
    enum result result = FAILED;
    int slot;
    Grant *grant = find(self, region);
    if (grant == NULL || offset < 0 || (slot = enter(self, grant)) < 0) {
        Py_XDECREF((PyObject *)grant);
        PyBuffer_Release(place);
        return PyErr_Occurred() ? -2 : -1;
    }
    int64_t size = place->len;
    if (self->usable && version_of(self, grant) == grant->version) {
        int64_t have = size_of(self, grant) - offset;
        if (fewer && size > have)
            size = have = have > 0 ? have : 0;
        if (size > have || size > grant->room - offset) {
            result = FAILED; /* the provider reports the error, or extends the grant */
        } else if (grant->fd < 0) {
            copy(place->buf, (const char *)grant->view.buf + grant->start + offset, (size_t)size);
            result = DONE;
        } else {
            result =
                read_file(grant, place->buf, size, grant->start + offset, wait || self->in_memory);
        }
    }
    bool good = still(self, grant);
    leave(self, slot);
    if (result != RAISED && !good)
        drop(self, region, grant);
    Py_DECREF(grant);
    PyBuffer_Release(place);
    return PyErr_Occurred() ? -2 : result == DONE && good ? size : -1;
}

static PyObject *path_size(PyObject *object, PyObject *region)
{
    FastPath *self = (FastPath *)object;
    Grant *grant = find(self, region);
    if (grant == NULL)
        return PyErr_Occurred() ? NULL : PyLong_FromLong(-1);
    int64_t size = size_of(self, grant);
    bool good = self->usable && version_of(self, grant) == grant->version;
    Py_DECREF(grant);
    return PyLong_FromLongLong(good ? size : -1);
}

static PyObject *path_write(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer data;
    if (!counted("write", count, 3, 3))
        return NULL;
    /* One after the other: nothing is called while there is an exception. */
    int64_t offset = offset_of(args[1]);
    if (offset < -1)
        return NULL;
    if (PyObject_GetBuffer(args[2], &data, PyBUF_SIMPLE) < 0)
        return NULL;
    int done = store((FastPath *)object, args[0], offset, &data);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *path_try_write(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer data;
    if (!counted("try_write", count, 3, 3))
        return NULL;
    if (!plain(args, &data, PyBUF_SIMPLE))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    int done = store((FastPath *)object, args[0], offset_of(args[1]), &data);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *path_read_some(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer place;
    if (!counted("read_some", count, 3, 5))
        return NULL;
    int64_t offset = offset_of(args[1]);
    if (offset < -1)
        return NULL;
    int wait = given(args, count, 3, true);
    if (wait < 0)
        return NULL;
    int fewer = given(args, count, 4, true);
    if (fewer < 0 || PyObject_GetBuffer(args[2], &place, PyBUF_WRITABLE) < 0)
        return NULL;
    int64_t size = load((FastPath *)object, args[0], offset, &place, wait, fewer);
    return size < -1 ? NULL : PyLong_FromLongLong(size);
}

static PyObject *path_try_read(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer place;
    if (!counted("try_read", count, 3, 3))
        return NULL;
    if (!plain(args, &place, PyBUF_WRITABLE))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    int64_t size = load((FastPath *)object, args[0], offset_of(args[1]), &place, true, false);
    return size < -1 ? NULL : PyBool_FromLong(size >= 0);
}

static PyObject *path_living(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(living((FastPath *)object));
}

static PyObject *path_busy(PyObject *object, void *Py_UNUSED(closure))
{
    FastPath *self = (FastPath *)object;
    return PyLong_FromLong(self->slots - __builtin_popcountll(self->free));
}

static PyObject *path_recent(PyObject *object, void *Py_UNUSED(closure))
{
    FastPath *self = (FastPath *)object;
    uint64_t end = self->writes, count = end < RECENT ? end : RECENT;
    PyObject *found = PyTuple_New((Py_ssize_t)count);
    for (uint64_t i = 0; found != NULL && i < count; i++) {
        PyObject *time = PyLong_FromUnsignedLongLong(self->recent[(end - count + i) % RECENT]);
        if (time == NULL || PyTuple_SetItem(found, (Py_ssize_t)i, time) < 0)
            Py_CLEAR(found);
    }
    return found;
}

static PyMethodDef path_methods[] = {
    {"size", path_size, METH_O, "size($self, region, /)\n--\n\n"},
    {"write", (PyCFunction)(void (*)(void))path_write, METH_FASTCALL,
     "write($self, region, offset, data, /)\n--\n\n"},
    {"try_write", (PyCFunction)(void (*)(void))path_try_write, METH_FASTCALL,
     "try_write($self, region, offset, data, /)\n--\n\n"},
    {"read_some", (PyCFunction)(void (*)(void))path_read_some, METH_FASTCALL,
     "read_some($self, region, offset, place, wait=True, short=True, /)\n--\n\n"},
    {"try_read", (PyCFunction)(void (*)(void))path_try_read, METH_FASTCALL,
     "try_read($self, region, offset, place, /)\n--\n\n"},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef path_members[] = {
    {"grants", T_OBJECT_EX, offsetof(FastPath, grants), READONLY, NULL},
    {"table", T_OBJECT_EX, offsetof(FastPath, words), READONLY, NULL},
    {"usable", T_BOOL, offsetof(FastPath, usable), 0, NULL},
    {"writable", T_BOOL, offsetof(FastPath, writable), READONLY, NULL},
    {"in_memory", T_BOOL, offsetof(FastPath, in_memory), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef path_getset[] = {
    {"living", path_living, NULL, "Whether the provider lives.", NULL},
    {"busy", path_busy, NULL, "How many accesses are under way.", NULL},
    {"recent", path_recent, NULL, "The latest write_times of its own.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot path_slots[] = {
    {Py_tp_doc, "Accesses granted regions."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, path_init},
    {Py_tp_traverse, path_traverse},
    {Py_tp_clear, path_clear},
    {Py_tp_dealloc, path_dealloc},
    {Py_tp_methods, path_methods},
    {Py_tp_members, path_members},
    {Py_tp_getset, path_getset},
    {0, NULL},
};

static PyType_Spec path_spec = {
    .name = "warabi.shm._fast_path.FastPath",
    .basicsize = sizeof(FastPath),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = path_slots,
};

/* The module; its state is the type of grants. */

static int module_exec(PyObject *module)
{
    PyObject **grant_type = PyModule_GetState(module);
    *grant_type = PyType_FromModuleAndSpec(module, &grant_spec, NULL);
    if (*grant_type == NULL || PyModule_AddType(module, (PyTypeObject *)*grant_type) < 0)
        return -1;
    PyObject *path = PyType_FromModuleAndSpec(module, &path_spec, NULL);
    if (path == NULL)
        return -1;
    int added = PyModule_AddType(module, (PyTypeObject *)path);
    Py_DECREF(path);
    return added;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(*(PyObject **)PyModule_GetState(module));
    return 0;
}

static int module_clear(PyObject *module)
{
    Py_CLEAR(*(PyObject **)PyModule_GetState(module));
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "warabi.shm._fast_path",
    .m_doc = "Reads and writes of a guest in granted regions.",
    .m_size = sizeof(PyObject *),
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__fast_path(void)
{
    return PyModuleDef_Init(&module_def);
}
