/* What our operators need of PyTorch: its stable interface for C, as torch/csrc/inductor/aoti_torch/c/shim.h and
 * torch/csrc/stable/c/shim.h give it. */
#pragma once
#include <stdint.h>

typedef void *Handle;
typedef uint64_t Value; /* an argument: a Handle that is the operator's own, or the bits of a number */

extern int32_t aoti_torch_library_init_fragment(const char *space, const char *file, uint32_t line, Handle *library);
extern int32_t aoti_torch_library_init_impl(const char *space, const char *key, const char *file, uint32_t line, Handle *library);
extern int32_t aoti_torch_library_def(Handle library, const char *schema);
extern int32_t aoti_torch_library_impl(Handle library, const char *name, void (*call)(Value *, uint64_t, uint64_t));
extern int32_t aoti_torch_get_data_ptr(Handle tensor, void **pointer);
extern int32_t aoti_torch_get_size(Handle tensor, int64_t dimension, int64_t *size);
extern int32_t aoti_torch_get_stride(Handle tensor, int64_t dimension, int64_t *stride);
extern int32_t aoti_torch_delete_tensor_object(Handle tensor);
extern int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*part)(int64_t, int64_t, void *), void *context);

static inline void *data_of(Value tensor) {
    void *found;
    aoti_torch_get_data_ptr((Handle)tensor, &found);
    return found;
}

static inline int64_t size_of(Value tensor, int64_t dimension) {
    int64_t found;
    aoti_torch_get_size((Handle)tensor, dimension, &found);
    return found;
}

static inline int64_t stride_of(Value tensor, int64_t dimension) {
    int64_t found;
    aoti_torch_get_stride((Handle)tensor, dimension, &found);
    return found;
}

static inline void let_go(Value *tensors, int count) {
    for (int at = 0; at < count; at++) aoti_torch_delete_tensor_object((Handle)tensors[at]);
}

/* Installs `call` for CPUs when the library is loaded. Where PyTorch refuses it, it is missing there. */
static inline void install_as(const char *name, const char *schema, void (*call)(Value *, uint64_t, uint64_t)) {
    Handle library = 0;
    if (aoti_torch_library_init_fragment("tidegate", name, 0, &library) || aoti_torch_library_def(library, schema)) return;
    if (aoti_torch_library_init_impl("tidegate", "CPU", name, 0, &library)) return;
    aoti_torch_library_impl(library, name, call);
}
