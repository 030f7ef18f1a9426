// A tensor as the kernels see it: memory, shape and strides, without ownership. Nothing here knows Python or PyTorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace interformer {

// The declarations of DLPack (version 1) that a view is made from, repeated here so that no header of it is needed. The
// layout is a frozen ABI: fields must not move.
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
    int32_t type;
    int32_t id;
};

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct Version {
    uint32_t major;
    uint32_t minor;
};

struct ExchangeHeader {
    Version version;
    ExchangeHeader* previous;  // a table of an older version, or null
};

// The struct behind `type(tensor).__dlpack_c_exchange_api__`. Entries that are not called here stay untyped.
struct ExchangeTable {
    ExchangeHeader header;
    void (*allocate)();
    void (*managed_tensor_from_object)();
    void (*managed_tensor_to_object)();
    int (*tensor_from_object)(void* object, Tensor* out);
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

static_assert(sizeof(DataType) == 4 && sizeof(Device) == 8);
static_assert(sizeof(void*) != 8 || (sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24));
static_assert(sizeof(void*) != 8 || (sizeof(ExchangeHeader) == 16 && sizeof(ExchangeTable) == 56));
static_assert(sizeof(void*) != 8 || offsetof(ExchangeTable, tensor_from_object) == 40);

}  // namespace dlpack

// Pinned memory counts as the CPU's.
inline bool on_cpu(dlpack::Device device) {
    return device.type == dlpack::kCPU || device.type == dlpack::kCUDAHost;
}

enum class DType { float32, float64, bfloat16, float16, int32, int64, other };

struct TensorView {
    static constexpr int kMaxAxes = 8;  // a tensor with more has only `axes` set: no kernel takes one

    void* data = nullptr;
    DType dtype = DType::other;
    dlpack::Device device{dlpack::kCPU, 0};
    dlpack::DataType raw_type{};
    int axes = 0;
    int64_t shape[kMaxAxes] = {};
    int64_t strides[kMaxAxes] = {};  // in elements

    int64_t size() const {
        int64_t product = 1;
        for (int i = 0; i < axes && i < kMaxAxes; ++i) product *= shape[i];
        return product;
    }

    // Gives a tensor without elements, whose data is null, an address, with strides of 0: pointer arithmetic on null is
    // undefined.
    void point_at(void* address) {
        data = address;
        for (int64_t& stride : strides) stride = 0;
    }
};

// A typed pointer into a view with `Axes` axes. `at(i, j, ...)` is the element with these leading indices; the others
// are 0.
template <typename T, int Axes>
struct Strided {
    T* data;
    int64_t strides[Axes];

    explicit Strided(const TensorView& view) : data(static_cast<T*>(view.data)) {
        for (int i = 0; i < Axes; ++i) strides[i] = view.strides[i];
    }

    template <typename... Index>
    T* at(Index... index) const {
        static_assert(sizeof...(Index) <= Axes);
        int64_t offset = 0;
        int axis = 0;
        ((offset += static_cast<int64_t>(index) * strides[axis++]), ...);
        return data + offset;
    }
};

}  // namespace interformer
