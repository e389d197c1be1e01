// Threads that share out the chunks of one job at a time.
//
// Each thread has its own run of chunks and takes from the others' when that is done, so a thread that the
// system has put aside delays nothing but the chunk it holds. Workers watch for the next job for some tens of
// microseconds, the gap between two matrices of a step, and then sleep; between two jobs nobody takes a lock.

#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

class ThreadPool {
public:
    using Function = void (*)(void* context, int64_t chunk);

    explicit ThreadPool(int threads) : owner_(getpid()), runs_(threads) {
        try {
            for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
        } catch (...) {
            end();
            throw;
        }
    }

    ~ThreadPool() { end(); }

    // False in a forked child: the threads are the parent's, to be neither woken, nor joined, nor destroyed.
    bool owned() const { return getpid() == owner_; }

    int threads() const { return static_cast<int>(runs_.size()); }

    // Calls function(context, i) for every i below chunks; returns when all are done. One caller at a time.
    void run(Function function, void* context, int64_t chunks) {
        if (chunks <= 1 || workers_.empty() || !owned()) {
            for (int64_t i = 0; i < chunks; i++) function(context, i);
            return;
        }
        function_ = function;
        context_ = context;
        for (int i = 0; i < threads(); i++) {
            runs_[i].next.store(chunks * i / threads(), std::memory_order_relaxed);
            runs_[i].end = chunks * (i + 1) / threads();
        }
        open_.store(true);
        epoch_.fetch_add(1);
        wake();
        take(0);
        // A worker says that it is active before it looks whether the job is open: either it sees that this
        // one is closed, or it is seen here, and the next job's fields wait for it.
        open_.store(false);
        for (int spins = 0; active_.load() > 0; spins++) {
            if (spins < 4096) pause();
            else std::this_thread::yield();
        }
    }

private:
    // Of one thread, in a cache line of its own.
    struct alignas(64) Run {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    void end() {
        stop_.store(true);
        epoch_.fetch_add(1);
        wake();
        for (std::thread& worker : workers_) worker.join();
    }

    void wake() {
        if (sleepers_.load() == 0) return;
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void take(int thread) {
        const int count = threads();
        for (int i = 0; i < count; i++) {
            Run& run = runs_[(thread + i) % count];
            int64_t chunk;
            while (run.next.load(std::memory_order_relaxed) < run.end &&
                   (chunk = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end)
                function_(context_, chunk);
        }
    }

    void work(int thread) {
        uint64_t seen = 0;
        for (;;) {
            if (!watch(seen)) sleep(seen);
            seen = epoch_.load();
            if (stop_.load()) return;
            active_.fetch_add(1);
            if (open_.load()) take(thread);
            active_.fetch_sub(1);
        }
    }

    bool watch(uint64_t seen) const {
        using clock = std::chrono::steady_clock;
        clock::time_point end = clock::now() + std::chrono::microseconds(SPIN_MICROSECONDS);
        do {
            for (int i = 0; i < 16; i++) {
                if (epoch_.load() != seen) return true;
                pause();
            }
        } while (clock::now() < end);
        return false;
    }

    void sleep(uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        // Counted before the epoch is looked at: run() looks at them the other way round.
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleepers_.fetch_sub(1);
    }

    static constexpr int SPIN_MICROSECONDS = 20;

    const pid_t owner_;
    std::vector<Run> runs_;
    std::vector<std::thread> workers_;
    Function function_ = nullptr;
    void* context_ = nullptr;
    std::atomic<bool> open_{false};
    std::atomic<bool> stop_{false};
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int> active_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;  // of those who sleep
    std::condition_variable wake_;
};
