// Every job of the kernels, on numbers that are the same everywhere; prints lines of a name and the result's
// bytes in hexadecimal. test_other_machines.py compiles it.

#include "kernels.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern "C" {
void* kernels_open(int threads, const char* variant);
void kernels_close(void* handle);
void kernels_run(void* handle, const Entry* entries, int64_t count, int64_t rows);
int64_t kernels_packed_bytes(int format, int64_t n, int64_t k);
void kernels_pack(void* handle, int format, const uint8_t* rows, uint8_t* packed, int64_t n, int64_t k);
bool kernels_unpack(int format, const uint8_t* packed, const int64_t* ids, uint8_t* out, int64_t count,
                    int64_t n, int64_t k);
}

namespace {

struct Random {
    uint64_t state;
    uint32_t bits() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return (uint32_t)(state >> 32);
    }
    float number() { return (float)(int32_t)bits() * 0x1p-30f; }  // from -2 to 2
};

std::vector<float> numbers(Random& random, int64_t count) {
    std::vector<float> out((size_t)count);
    for (float& number : out) number = random.number();
    return out;
}

void print(const std::string& name, const void* bytes, size_t count) {
    printf("%s ", name.c_str());
    for (size_t i = 0; i < count; i++) printf("%02x", ((const uint8_t*)bytes)[i]);
    printf("\n");
}

void print(const std::string& name, const std::vector<float>& values) {
    print(name, values.data(), values.size() * sizeof(float));
}

template <class Job>
void run(void* kernels, Kind kind, const Job& job, int64_t rows) {
    const Entry entry = {kind, &job};
    kernels_run(kernels, &entry, 1, rows);
}

// Random bytes, dense numbers and scales of either sign and of a size to be added up.
std::vector<uint8_t> matrix(Random& random, int format, int64_t n, int64_t k) {
    const Layout layout = layout_of(format);
    std::vector<uint8_t> out((size_t)(n * (k / layout.source_columns) * layout.source_bytes));
    for (uint8_t& byte : out) byte = (uint8_t)random.bits();
    for (size_t at = 0; at < out.size(); at += (size_t)layout.source_bytes) {
        uint8_t* block = &out[at];
        // A number of either sign whose highest byte is one of so many from first.
        auto top = [&](int first, uint32_t many) {
            const uint32_t bits = random.bits();
            return (uint8_t)((first + (int)(bits % many)) | (int)(bits >> 24 & 0x80));
        };
        if (format == F32) {
            const float number = random.number();
            memcpy(block, &number, 4);
        } else if (format == F16) {
            block[1] = top(0x38, 8);
        } else if (format == BF16) {
            block[1] = top(0x3f, 1);
        } else {
            uint8_t* scales = block + (format == Q6_K ? 208 : 0);
            scales[1] = top(0x24, 8);
            if (format == Q4_1 || format == Q4_K) scales[3] = top(0x24, 8);
        }
    }
    return out;
}

void products(void* kernels, int format, const std::string& name) {
    Random random = {(uint64_t)format + 1};
    // Blocks of all rows that are no whole number of those that are rounded together; of one row alone fewer than those.
    const int64_t columns = layout_of(format).source_columns;
    const int64_t n = 37, k = is_dense(format) ? 45 : 3 * columns, most = 21;
    const std::vector<uint8_t> rows = matrix(random, format, n, k);
    std::vector<uint8_t> packed((size_t)kernels_packed_bytes(format, n, k)), back(rows.size());
    kernels_pack(kernels, format, rows.data(), packed.data(), n, k);
    print("packed " + name, packed.data(), packed.size());
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < n; i++) ids.push_back(i);
    const bool known = kernels_unpack(format, packed.data(), ids.data(), back.data(), n, n, k);
    std::vector<float> looked_up((size_t)(n * k));
    run(kernels, EMBED, Embed{packed.data(), ids.data(), looked_up.data(), k, format}, n);
    print("lookup " + name, looked_up);
    printf("unpacked %s %s\n", name.c_str(), known && back == rows ? "01" : "00");
    const std::vector<float> x = numbers(random, most * k), bias = numbers(random, n);
    for (int64_t count : {(int64_t)1, (int64_t)5, most}) {
        const std::vector<float> some(x.begin(), x.begin() + count * k);  // that more of it would be out of bounds
        std::vector<float> y((size_t)(count * n));
        Product job = {packed.data(), some.data(), bias.data(), y.data(), n, k, n, format};
        run(kernels, PRODUCT, job, count);
        print("product " + name + " " + std::to_string(count), y);
    }
}

// Keys and values to scattered pages, then attention: a decode of several spans, a chunk, a short decode.
void attention(void* kernels, int format, const std::string& name) {
    Random random = {(uint64_t)format + 100};
    const int64_t heads = 4, kv_heads = 2, dim = 32, width = (heads + 2 * kv_heads) * dim, page = 16;
    const int64_t lengths[] = {1100, 600, 7}, starts[] = {0, 1, 41, 42}, stride = 70;
    std::vector<int64_t> pages, slots;
    for (int64_t s = 0; s < 3; s++)
        for (int64_t i = 0; i < stride; i++) pages.push_back((i * 3 + s) % (3 * stride));
    for (int64_t s = 0; s < 3; s++)
        for (int64_t i = 0; i < lengths[s]; i++)
            slots.push_back(pages[(size_t)(s * stride + i / page)] * page + i % page);
    Pool pool = {nullptr, format, kv_heads, dim};
    std::vector<uint8_t> data((size_t)(3 * stride * page * pool_row_bytes(pool)), 0xff);
    pool.data = data.data();
    const int64_t total = (int64_t)slots.size();
    std::vector<float> qkv = numbers(random, total * width), cos = numbers(random, total * dim);
    std::vector<float> sin = numbers(random, total * dim);
    std::vector<float> head_norm = numbers(random, (heads + kv_heads) * dim);
    const Turns turns = {cos.data(), sin.data(), nullptr};
    Rotate write = {qkv.data(), head_norm.data(), &turns, slots.data(), pool, heads, 1e-5f};
    run(kernels, ROTATE, write, total);
    print("rotate " + name, qkv.data(), (size_t)(50 * width) * sizeof(float));
    print("pool " + name, data.data(), (size_t)(50 * pool_row_bytes(pool)));
    // The rows of queries: the last of each sequence.
    std::vector<float> query, out((size_t)(42 * heads * dim));
    for (int64_t s = 0, end = 0; s < 3; s++) {
        end += lengths[s];
        const float* last = qkv.data() + end * width;
        query.insert(query.end(), last - (starts[s + 1] - starts[s]) * width, last);
    }
    const Sequences sequences = {pages.data(), starts, lengths, 3, stride};
    for (int64_t window : {0, 50, 530}) {
        Attention job = {&sequences, pool, query.data(), out.data(), heads, page, window, width, 0.17f};
        run(kernels, ATTENTION, job, 42);
        print("attention " + name + " " + std::to_string(window), out);
    }
}

void between(void* kernels) {
    Random random = {7};
    const int64_t rows = 5, width = 80;
    std::vector<float> x = numbers(random, rows * width), out((size_t)(rows * width));
    const std::vector<float> delta = numbers(random, rows * width), weight = numbers(random, width);
    run(kernels, NORM, Norm{x.data(), delta.data(), weight.data(), out.data(), width, 1e-5f}, rows);
    print("norm", out);
    const std::vector<float> gate_up = numbers(random, rows * 2 * width);
    run(kernels, SILU_AND_MUL, SiluAndMul{gate_up.data(), out.data(), width}, rows);
    print("silu", out);
}

// A whole layer, which the threads may divide by sequences of so many rows, or by rows of one.
void layer(void* kernels, int64_t count, int64_t each, const std::string& name) {
    Random random = {(uint64_t)count};
    const int64_t heads = 4, kv_heads = 2, dim = 32, hidden = heads * dim, width = hidden + 2 * kv_heads * dim;
    const int64_t rows = count * each, page = 16, stride = (each + page - 1) / page;
    const int64_t inner = 224;
    std::vector<std::vector<uint8_t>> weights;
    auto add = [&](int64_t n, int64_t k) {
        const std::vector<uint8_t> plain = matrix(random, Q4_1, n, k);
        weights.emplace_back((size_t)kernels_packed_bytes(Q4_1, n, k));
        kernels_pack(kernels, Q4_1, plain.data(), weights.back().data(), n, k);
    };
    add(width, hidden), add(hidden, hidden), add(2 * inner, hidden), add(hidden, inner);
    std::vector<int64_t> pages, slots, starts, lengths((size_t)count, each);
    for (int64_t s = 0; s <= count; s++) starts.push_back(s * each);
    for (int64_t i = 0; i < count * stride; i++) pages.push_back(count * stride - 1 - i);
    for (int64_t s = 0; s < count; s++)
        for (int64_t i = 0; i < each; i++) slots.push_back(pages[(size_t)(s * stride + i / page)] * page + i % page);
    Pool pool = {nullptr, F32, kv_heads, dim};
    std::vector<uint8_t> data((size_t)(count * stride * page * pool_row_bytes(pool)));
    pool.data = data.data();
    std::vector<float> x = numbers(random, rows * hidden), normed((size_t)(rows * hidden)), last((size_t)(rows * hidden));
    std::vector<float> qkv((size_t)(rows * width)), attended((size_t)(rows * hidden)), y((size_t)(rows * hidden));
    const std::vector<float> cos = numbers(random, rows * dim), sin = numbers(random, rows * dim);
    std::vector<float> gates((size_t)(rows * 2 * inner)), gated((size_t)(rows * inner));
    const std::vector<float> norms = numbers(random, hidden), bias = numbers(random, std::max(width, 2 * inner));
    const Turns turns = {cos.data(), sin.data(), nullptr};
    const Sequences sequences = {pages.data(), starts.data(), lengths.data(), count, stride};
    const Norm before = {x.data(), nullptr, norms.data(), normed.data(), hidden, 1e-5f};
    const Product first = {weights[0].data(), normed.data(), bias.data(), qkv.data(), width, hidden, width, Q4_1};
    const Rotate write = {qkv.data(), nullptr, &turns, slots.data(), pool, heads, 1e-5f};
    const Attention attend = {&sequences, pool, qkv.data(), attended.data(), heads, page, 0, width, 0.17f};
    const Product back = {weights[1].data(), attended.data(), bias.data(), y.data(), hidden, hidden, hidden, Q4_1};
    const Product up = {weights[2].data(), y.data(), bias.data(), gates.data(), 2 * inner, hidden, 2 * inner, Q4_1};
    const SiluAndMul silu = {gates.data(), gated.data(), inner};
    const Product down = {weights[3].data(), gated.data(), nullptr, y.data(), hidden, inner, hidden, Q4_1};
    const Norm after = {x.data(), y.data(), norms.data(), last.data(), hidden, 1e-5f};
    const Entry entries[] = {{NORM, &before},  {PRODUCT, &first}, {ROTATE, &write},
                             {ATTENTION, &attend}, {PRODUCT, &back}, {PRODUCT, &up},
                             {SILU_AND_MUL, &silu}, {PRODUCT, &down}, {NORM, &after}};
    kernels_run(kernels, entries, 9, rows);
    print("layer " + name, last);
}

}  // namespace

int main(int argc, char** argv) {
    void* kernels = argc == 3 ? kernels_open(atoi(argv[1]), argv[2]) : nullptr;
    if (!kernels) return 1;
    const struct {
        int format;
        const char* name;
    } formats[] = {{F32, "F32"},   {F16, "F16"},   {BF16, "BF16"}, {Q4_0, "Q4_0"},
                   {Q4_1, "Q4_1"}, {Q8_0, "Q8_0"}, {Q4_K, "Q4_K"}, {Q6_K, "Q6_K"}};
    for (const auto& one : formats) products(kernels, one.format, one.name);
    for (const auto& one : formats)
        if (is_dense(one.format)) attention(kernels, one.format, one.name);
    attention(kernels, INT8, "INT8");
    between(kernels);
    layer(kernels, 39, 1, "of decodes");
    layer(kernels, 40, 4, "of chunks");
    layer(kernels, 1, 390, "of a prompt");
    kernels_close(kernels);
}
