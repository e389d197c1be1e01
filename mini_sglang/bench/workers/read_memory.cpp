// Reads memory and does nothing else, for the bandwidth that a machine gives to its threads.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

static std::uint64_t sum(const std::uint64_t* data, std::size_t words) {
    std::uint64_t parts[32] = {};  // eight 256-bit or four 512-bit sums that do not wait for each other
    for (std::size_t at = 0; at + 32 <= words; at += 32)
        for (std::size_t i = 0; i < 32; i++) parts[i] += data[at + i];
    std::uint64_t all = 0;
    for (std::uint64_t part : parts) all += part;
    return all;
}

// Seconds that `threads` threads take to read `bytes` bytes at `data` once, each its own share.
extern "C" double read_memory(const void* data, std::size_t bytes, int threads, std::uint64_t* result) {
    const std::size_t share = bytes / sizeof(std::uint64_t) / threads;
    const auto* words = static_cast<const std::uint64_t*>(data);
    std::vector<std::uint64_t> sums(threads);
    std::vector<std::thread> others;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 1; i < threads; i++)
        others.emplace_back([&, i] { sums[i] = sum(words + i * share, share); });
    sums[0] = sum(words, share);
    for (auto& other : others) other.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    for (std::uint64_t part : sums) *result += part;
    return taken.count();
}
