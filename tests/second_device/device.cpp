// Two devices named cuda:0 and cuda:1 whose memory is the processor's own, for a torch that was built without CUDA.
//
// What code for a GPU gets wrong without one shows here: operations that mix devices are refused; a copy out of pinned
// memory that nobody waits for reads that memory as late as it may, and a copy into it arrives as late; and everything
// that would make the processor wait for a GPU is counted. Arithmetic is the processor's: of a GPU's this tells nothing.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <sstream>

namespace {

using Lock = std::lock_guard<std::recursive_mutex>;
std::recursive_mutex mutex;
bool pins = true;  // whether the system has memory to pin

// ---------------------------------------------------------------- what happened

std::map<std::string, int64_t> counts;
thread_local int within = 0;  // an operation that the processor does for the device: its own copies are no transfers

struct Within {
    Within() { ++within; }
    ~Within() { --within; }
};

void count(const std::string& what, int64_t number = 1) {
    Lock lock(mutex);
    if (!within) counts[what] += number;
}

// ---------------------------------------------------------------- memory

constexpr c10::DeviceIndex DEVICES = 2;
thread_local c10::DeviceIndex current = 0;
int64_t allocations_left = -1;  // until one fails; negative: none does

struct On {  // as long as it lives, the current device is another
    explicit On(c10::DeviceIndex index) : before(current) {
        if (index >= 0) current = index;
    }
    ~On() { current = before; }
    c10::DeviceIndex before;
};

void* filled(std::size_t bytes, int byte) {
    void* memory = nullptr;
    TORCH_CHECK(!bytes || !posix_memalign(&memory, 512, bytes), "no memory");
    if (memory) std::memset(memory, byte, bytes);  // so that numbers that nobody wrote are not zero by chance
    return memory;
}

using Blocks = std::map<const char*, std::size_t>;
Blocks pinned, taken;  // by their first address; `taken` of the devices

template <Blocks& blocks>
void give_back(void* memory) {
    {
        Lock lock(mutex);
        blocks.erase(static_cast<const char*>(memory));
    }
    std::free(memory);
}

int64_t total(const Blocks& blocks) {
    Lock lock(mutex);
    int64_t sum = 0;
    for (const auto& [_, bytes] : blocks) sum += static_cast<int64_t>(bytes);
    return sum;
}

int64_t most = 0;  // of `taken`, since it was last asked to begin anew

struct DeviceMemory final : public at::Allocator {
    c10::DataPtr allocate(std::size_t bytes) override {
        Lock lock(mutex);
        TORCH_CHECK(allocations_left != 0 || within, "CUDA out of memory");
        if (allocations_left > 0 && !within) --allocations_left;
        void* memory = filled(bytes, 0xAB);
        if (memory) taken[static_cast<const char*>(memory)] = bytes;
        most = std::max(most, total(taken));
        return {memory, memory, &give_back<taken>, c10::Device(c10::kCUDA, current)};
    }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} device_memory;

struct PinnedMemory final : public at::Allocator {
    c10::DataPtr allocate(std::size_t bytes) override {
        TORCH_CHECK(pins, "no memory can be pinned");
        // by the power of two, as torch's allocator of pinned memory
        std::size_t whole = 1;
        while (whole < bytes) whole *= 2;
        void* memory = filled(whole, 0xCD);
        Lock lock(mutex);
        pinned[static_cast<const char*>(memory)] = whole;
        return {memory, memory, &give_back<pinned>, c10::Device(c10::kCPU)};
    }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} pinned_memory;

bool is_pinned(const void* address) {
    Lock lock(mutex);
    auto next = pinned.upper_bound(static_cast<const char*>(address));
    if (next == pinned.begin()) return false;
    --next;
    return static_cast<const char*>(address) < next->first + next->second;
}

// ---------------------------------------------------------------- transfers

struct Transfer {
    int64_t number;
    c10::DeviceIndex device;  // each has an order of its own
    at::Tensor to, from;
};
std::list<Transfer> uploads, downloads;  // those that nobody waited for
int64_t transfers = 0;

at::Tensor seen_by_the_processor(const at::Tensor& tensor) {
    auto kept = tensor.detach();
    return at::from_blob(
        tensor.data_ptr(), tensor.sizes(), tensor.strides(), [kept](void*) {}, tensor.options().device(at::kCPU));
}

void do_now(const at::Tensor& to, const at::Tensor& from) {
    Within here;
    c10::impl::ExcludeDispatchKeyGuard plain(
        c10::autograd_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::Python));
    auto target = to.is_cuda() ? seen_by_the_processor(to) : to.detach();
    target.copy_(from.is_cuda() ? seen_by_the_processor(from) : from.detach());
}

void finish_downloads(c10::DeviceIndex device, int64_t last, const at::Tensor* into = nullptr) {
    for (auto it = downloads.begin(); it != downloads.end();) {
        if (it->device == device && it->number <= last && (!into || it->to.is_alias_of(*into))) {
            do_now(it->to, it->from);
            it = downloads.erase(it);
        } else {
            ++it;
        }
    }
}

void finish_uploads(c10::DeviceIndex device, int64_t last) {
    for (auto it = uploads.begin(); it != uploads.end();) {
        if (it->device == device && it->number <= last) {
            finish_downloads(device, it->number, &it->from);  // all is done in the order in which it was asked for
            do_now(it->to, it->from);
            it = uploads.erase(it);
        } else {
            ++it;
        }
    }
}

void finish_until(c10::DeviceIndex device, int64_t last) {
    Lock lock(mutex);
    finish_uploads(device, last);
    finish_downloads(device, last);
}

void before_use(const at::Tensor& tensor) {  // of a tensor's numbers, by its device
    if (!tensor.defined() || !tensor.is_cuda()) return;
    Lock lock(mutex);
    int64_t last = -1;
    for (const auto& upload : uploads)
        if (upload.to.is_alias_of(tensor)) last = upload.number;
    if (last >= 0) finish_uploads(tensor.device().index(), last);
}

void wait_for(c10::DeviceIndex device, const std::string& why) {
    if (within) return;
    count("waits");
    count("waits for " + why);
    finish_until(device, transfers);
}

// ---------------------------------------------------------------- operations

void by_the_processor(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
    const auto& schema = operation.schema();
    const auto& name = schema.operator_name().name;
    std::optional<c10::Device> device;
    auto look = [&](const at::Tensor& tensor) {
        if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) return;
        TORCH_CHECK(
            !device || *device == tensor.device(), "Expected all tensors to be on the same device, but found at least ",
            "two devices, ", *device, " and ", tensor.device(), "! (", name, ")");
        device = tensor.device();
        before_use(tensor);
    };
    for (std::size_t i = stack->size() - schema.arguments().size(); i < stack->size(); ++i) {
        const auto& value = (*stack)[i];
        if (value.isTensor()) look(value.toTensor());
        if (value.isTensorList())
            for (const at::Tensor& tensor : value.toTensorList()) look(tensor);
    }
    count("kernels");
    {
        On there(device ? device->index() : current);
        Within here;
        at::native::cpu_fallback(operation, stack);
    }
    for (const auto& result : schema.returns())
        if (result.type()->kind() == c10::TypeKind::BoolType || result.type()->kind() == c10::TypeKind::NumberType)
            wait_for(device ? device->index() : current, name);
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
    On there(device ? device->index() : current);
    return at::detail::empty_generic(
        size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
    On there(device ? device->index() : current);
    return at::detail::empty_strided_generic(
        size, stride, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

// Whether bytes can go as they are. Where not, torch turns them round, or converts them, in memory of the device.
bool plain(const at::Tensor& to, const at::Tensor& from) {
    bool same = to.dtype() == from.dtype() && to.sizes() == from.sizes();
    return same && ((to.is_contiguous() && from.is_contiguous()) ||
                    (to.strides() == from.strides() && to.is_non_overlapping_and_dense()));
}

at::Tensor& upload(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
    count("uploads");
    count("uploaded bytes", static_cast<int64_t>(from.nbytes()));
    const bool is_plain = plain(to, from), from_pinned = is_pinned(from.data_ptr());
    const auto device = to.device().index();
    if (!is_plain && (non_blocking || to.dtype() == from.dtype())) {
        On there(device);
        device_memory.allocate(to.nbytes());  // for a moment
    }
    if (non_blocking && is_plain && from_pinned) {
        uploads.push_back({++transfers, device, to.detach(), from.detach()});
        return to;
    }
    do_now(to, from);
    wait_for(device, from_pinned ? "a copy from pinned memory" : "a copy from memory that is not pinned");
    return to;
}

at::Tensor& download(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
    count("downloads");
    before_use(from);
    const auto device = from.device().index();
    if (non_blocking && plain(to, from) && is_pinned(to.data_ptr())) {
        // the device copies in the order of its operations: what it holds now is what comes, whenever that is
        downloads.push_back({++transfers, device, to.detach(), seen_by_the_processor(from).clone()});
        return to;
    }
    do_now(to, from);
    wait_for(device, "a copy to the processor");
    return to;
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
    Lock lock(mutex);
    if (!within && !from.is_cuda()) {
        before_use(to);
        return upload(to, from, non_blocking);
    }
    if (!within && !to.is_cuda()) return download(to, from, non_blocking);
    before_use(from);
    before_use(to);
    count("kernels");
    do_now(to, from);
    return to;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
    do_now(to, from);
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
    if (to.sizes() != from.sizes()) to.resize_(from.sizes());
    do_now(to, from);
    return to;
}

at::Scalar one_number(const at::Tensor& tensor) {
    before_use(tensor);
    wait_for(tensor.device().index(), "one number");
    return at::_local_scalar_dense(seen_by_the_processor(tensor));
}

const at::Tensor& resize(const at::Tensor& tensor, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
    auto* made = tensor.unsafeGetTensorImpl();
    const auto numbers = c10::multiply_integers(size);
    const std::size_t bytes = (numbers + tensor.storage_offset()) * tensor.itemsize();
    const auto& storage = made->storage();
    if (storage.nbytes() < bytes) {
        On there(tensor.device().index());
        auto memory = device_memory.allocate(bytes);
        if (storage.nbytes()) std::memcpy(memory.get(), storage.data(), storage.nbytes());
        storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
        storage.unsafeGetStorageImpl()->set_nbytes(bytes);
    }
    made->set_sizes_contiguous(size);
    return tensor;
}

at::Tensor reshape_alias(const at::Tensor& tensor, at::IntArrayRef size, at::IntArrayRef stride) {
    return at::native::as_strided_tensorimpl(tensor, size, stride, tensor.storage_offset());
}

at::Tensor& set_storage(
    at::Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
    auto* made = tensor.unsafeGetTensorImpl();
    made->set_storage_keep_dtype(std::move(storage));
    made->set_storage_offset(offset);
    made->set_sizes_and_strides(size, stride);
    return tensor;
}

// ---------------------------------------------------------------- what torch asks of a device

struct Guard final : public c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::kCUDA; }
    c10::Device getDevice() const override { return {c10::kCUDA, current}; }
    c10::Device exchangeDevice(c10::Device device) const override {
        auto before = getDevice();
        uncheckedSetDevice(device);
        return before;
    }
    void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
    void uncheckedSetDevice(c10::Device device) const noexcept override {
        if (device.index() >= 0) current = device.index();
    }
    c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return c10::Stream(c10::Stream::DEFAULT, stream.device()); }
    c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream& stream) const override { wait_for(stream.device_index(), "its stream"); }
    void synchronizeDevice(const c10::DeviceIndex device) const override { wait_for(device, "the device"); }
};

// by now this torch has settled that it has no CUDA: whose pinned memory it takes it asks of torch's spare device
struct Pinning final : public at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
    bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
    at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
    c10::DeviceIndex deviceCount() const override { return DEVICES; }
    c10::DeviceIndex getCurrentDevice() const override { return current; }
} pinning;

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

TORCH_LIBRARY_IMPL(_, CUDA, library) {
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_processor>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("empty.memory_format", empty);
    library.impl("empty_strided", empty_strided);
    library.impl("as_strided", at::native::as_strided_tensorimpl);
    library.impl("view", at::native::view);
    library.impl("_reshape_alias", reshape_alias);
    library.impl("copy_", copy);
    library.impl("_copy_from", copy_from);
    library.impl("_copy_from_and_resize", copy_from_and_resize);
    library.impl("_local_scalar_dense", one_number);
    library.impl("resize_", resize);
    library.impl("set_.source_Storage_storage_offset", set_storage);
}

TORCH_LIBRARY(second_device, library) {
    c10::SetAllocator(c10::kCUDA, &device_memory, 1);
    at::RegisterPrivateUse1HooksInterface(&pinning);
    // "name number" a line, since the last time it was asked
    library.def("counted() -> str", []() -> std::string {
        Lock lock(mutex);
        std::ostringstream text;
        for (const auto& [what, number] : counts) text << what << "\t" << number << "\n";
        counts.clear();
        return text.str();
    });
    library.def("pinned_bytes() -> int", [] { return total(pinned); });
    library.def("taken_bytes() -> int", [] { return total(taken); });
    library.def("most_bytes() -> int", [] { return most; });
    library.def("begin_anew() -> ()", [] { most = total(taken); });
    library.def("pin(bool possible) -> ()", [](bool possible) { pins = possible; });
    library.def("fail_after(int allocations) -> ()", [](int64_t number) { allocations_left = number; });
    library.def("now() -> int", [] { return transfers; });
    library.def("finish(int device, int last) -> ()", [](int64_t device, int64_t last) {
        count("waits for an event");
        finish_until(static_cast<c10::DeviceIndex>(device), last);
    });
    library.def("wait(int device) -> ()", [](int64_t device) {
        wait_for(static_cast<c10::DeviceIndex>(device), "the device");
    });
}
