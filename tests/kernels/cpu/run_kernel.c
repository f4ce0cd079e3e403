/* Calls one compiled kernel, __tvm_ffi_kernel, on arrays from standard input and writes the last
 * array to standard output. Stands in for TVM's runtime, so that kernels run where there is none:
 * a parallel loop runs its parts one after the other.
 *
 * Input: int32 number of arrays; for each int32 DLPack code, bits and number of dimensions,
 * int64 extents, int64 bytes, and the bytes, which may be more than the extents say. */
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

enum { MAX_ARRAYS = 16, MAX_DIMENSIONS = 4, PARTS = 3, ALIGNMENT = 64 };

typedef struct {
  void* sync_handle;
  int32_t num_task;
} Group;
typedef int (*Lambda)(int part, Group* group, void* data);

static int launch(Lambda lambda, void* data, int num_parts) {
  Group group = {NULL, num_parts > 0 ? num_parts : PARTS};
  for (int part = 0; part < group.num_task; ++part) {
    int status = lambda(part, &group, data);
    if (status != 0) return status;
  }
  return 0;
}

static void* allocate(size_t size) {
  return aligned_alloc(ALIGNMENT, (size + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
}

static void* take_workspace(int type, int id, uint64_t size, int code, int bits) {
  return allocate(size);
}

static int free_workspace(int type, int id, void* pointer) {
  free(pointer);
  return 0;
}

/* The pointers that TVM's runtime sets when it loads a library. */
int (*__TVMBackendParallelLaunch)(Lambda, void*, int) = launch;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = free_workspace;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t num_parts) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < num_parts; ++i) {
    if (parts[i] != NULL) fputs(parts[i], stderr);
  }
  fputc('\n', stderr);
}

int __tvm_ffi_kernel(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);

static void read_bytes(void* to, size_t size) {
  if (fread(to, 1, size, stdin) != size) {
    fputs("the input ends too early\n", stderr);
    exit(2);
  }
}

int main(void) {
  static DLTensor tensors[MAX_ARRAYS];
  static int64_t extents[MAX_ARRAYS][MAX_DIMENSIONS];
  static TVMFFIAny args[MAX_ARRAYS];
  int32_t num_arrays;
  int64_t size = 0;
  read_bytes(&num_arrays, sizeof num_arrays);
  if (num_arrays < 1 || num_arrays > MAX_ARRAYS) return 2;
  for (int i = 0; i < num_arrays; ++i) {
    int32_t head[3];
    read_bytes(head, sizeof head);
    if (head[2] > MAX_DIMENSIONS) return 2;
    read_bytes(extents[i], head[2] * sizeof(int64_t));
    read_bytes(&size, sizeof size);
    tensors[i].data = allocate(size);
    read_bytes(tensors[i].data, size);
    tensors[i].device.device_type = kDLCPU;
    tensors[i].dtype.code = head[0];
    tensors[i].dtype.bits = head[1];
    tensors[i].dtype.lanes = 1;
    tensors[i].ndim = head[2];
    tensors[i].shape = extents[i];
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_ptr = &tensors[i];
  }
  TVMFFIAny result = {0};
  if (__tvm_ffi_kernel(NULL, args, num_arrays, &result) != 0) return 1;
  return fwrite(tensors[num_arrays - 1].data, 1, size, stdout) == (size_t)size ? 0 : 2;
}
