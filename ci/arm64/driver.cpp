// Runs the kernels' C functions for another process: reads calls from standard input, answers with the
// memory that they left. Linked with the library's sources for a processor that only an emulator has.
//
// A call:  name | buffers, each its size and bytes | arguments, each one of
//   0  a number            1  an address in a buffer            2  a struct with addresses to fill in
// An answer:  what the function returned | all buffers. Numbers are little-endian; see remote_library.py.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <dlfcn.h>

namespace {

constexpr size_t GUARD = 4096;  // bytes on both sides of a buffer that no kernel may touch
constexpr unsigned char MARK = 0xa5;

[[noreturn]] void fail(const char* what, const char* name = "") {
    std::fprintf(stderr, "driver: %s %s\n", what, name);
    std::exit(3);
}

template <typename T>
T number() {
    T value;
    if (std::fread(&value, sizeof(value), 1, stdin) != 1) fail("a call was cut short");
    return value;
}

void bytes(void* target, size_t size) {
    if (size && std::fread(target, size, 1, stdin) != 1) fail("a call was cut short");
}

struct Buffer {
    char* whole;
    size_t size;

    explicit Buffer(size_t n) : size(n) {
        const size_t total = (n + 2 * GUARD + 63) / 64 * 64;
        whole = static_cast<char*>(std::aligned_alloc(64, total));
        if (!whole) fail("out of memory");
        std::memset(whole, MARK, n + 2 * GUARD);
    }
    char* data() const { return whole + GUARD; }
    bool intact() const {
        for (size_t i = 0; i < GUARD; i++)
            if ((unsigned char)whole[i] != MARK || (unsigned char)data()[size + i] != MARK) return false;
        return true;
    }
};

int64_t address(const std::vector<Buffer>& buffers) {
    const uint32_t index = number<uint32_t>();
    const uint64_t offset = number<uint64_t>();
    if (index >= buffers.size()) fail("no such buffer");
    return reinterpret_cast<int64_t>(buffers[index].data() + offset);
}

}  // namespace

int main() {
    for (uint32_t length; std::fread(&length, sizeof(length), 1, stdin) == 1;) {
        std::string name(length, '\0');
        bytes(&name[0], length);
        std::vector<Buffer> buffers;
        for (uint32_t n = number<uint32_t>(); n > 0; n--) {
            buffers.emplace_back(number<uint64_t>());
            bytes(buffers.back().data(), buffers.back().size);
        }
        int64_t arguments[10] = {};
        std::vector<std::vector<char>> structs;
        const uint32_t count = number<uint32_t>();
        if (count > 10) fail("too many arguments for", name.c_str());
        for (uint32_t i = 0; i < count; i++) {
            const uint8_t kind = number<uint8_t>();
            if (kind == 0) arguments[i] = number<int64_t>();
            else if (kind == 1) arguments[i] = address(buffers);
            else {
                structs.emplace_back(number<uint32_t>());
                bytes(structs.back().data(), structs.back().size());
                for (uint32_t n = number<uint32_t>(); n > 0; n--) {
                    const uint32_t at = number<uint32_t>();
                    const int64_t value = address(buffers);
                    std::memcpy(structs.back().data() + at, &value, 8);
                }
                arguments[i] = reinterpret_cast<int64_t>(structs.back().data());
            }
        }
        typedef int64_t (*Function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                    int64_t, int64_t);
        const Function call = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name.c_str()));
        if (!call) fail("no function", name.c_str());
        const int64_t* a = arguments;
        const int64_t result = call(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]);
        std::fwrite(&result, sizeof(result), 1, stdout);
        for (const Buffer& buffer : buffers) {
            if (!buffer.intact()) fail("memory beside a buffer was written by", name.c_str());
            if (buffer.size) std::fwrite(buffer.data(), buffer.size, 1, stdout);
            std::free(buffer.whole);
        }
        std::fflush(stdout);
    }
}
