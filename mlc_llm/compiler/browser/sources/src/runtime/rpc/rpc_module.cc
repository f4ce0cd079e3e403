/* Remote sessions are no part of a browser's runtime: who asks for one is told so. */
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/module.h>

#include <memory>

#include "rpc_session.h"

namespace tvm {
namespace runtime {

ffi::Module CreateRPCSessionModule(std::shared_ptr<RPCSession>) {
  TVM_FFI_THROW(RuntimeError) << "this runtime was built without remote sessions";
  TVM_FFI_UNREACHABLE();
}

}  // namespace runtime
}  // namespace tvm
