// Threads that share out the chunks of one job at a time.
//
// Each thread has its own run of chunks and takes from the others' when that is done, so a thread that the
// system has put aside delays nothing but the chunk it holds. Workers watch for the next job for some tens of
// microseconds, the gap between two matrices of a step, and then sleep; between two jobs nobody takes a lock. Who
// waits fetches into its caches what it was told that it would begin with.

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
    using Function = void (*)(void* context, int64_t chunk, int thread);

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

    // Chunks of a job that a thread has at first: from the one to below the other.
    int64_t first_chunk(int thread, int64_t chunks) const { return chunks * thread / threads(); }

    // What a thread fetches while it waits; the last to be told counts.
    void fetch_meanwhile(int thread, const uint8_t* from, const uint8_t* to) {
        runs_[thread].from.store(from, std::memory_order_relaxed);
        runs_[thread].to.store(to, std::memory_order_relaxed);
    }

    // Calls function(context, i, thread) for every i below chunks; returns when all are done. One caller at a time.
    void run(Function function, void* context, int64_t chunks) {
        if (chunks <= 1 || workers_.empty() || !owned()) {
            for (int64_t i = 0; i < chunks; i++) function(context, i, 0);
            return;
        }
        function_ = function;
        context_ = context;
        for (int i = 0; i < threads(); i++) {
            runs_[i].next.store(first_chunk(i, chunks), std::memory_order_relaxed);
            runs_[i].end = first_chunk(i + 1, chunks);
        }
        open_.store(true);
        epoch_.fetch_add(1);
        wake();
        take(0);
        // A worker says that it is active before it looks whether the job is open: either it sees that this
        // one is closed, or it is seen here, and the next job's fields wait for it.
        open_.store(false);
        Fetch fetch(runs_[0]);
        // Some even where nobody is waited for: this thread goes on to work that leaves memory alone.
        for (int i = 0; i < 32; i++) fetch.line();
        for (int spins = 0; active_.load() > 0; spins++) {
            if (spins >= 4096) std::this_thread::yield();
            else if (!fetch.line()) pause();
        }
    }

private:
    // Of one thread, in a cache line of its own.
    struct alignas(64) Run {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
        std::atomic<const uint8_t*> from{nullptr}, to{nullptr};  // to be fetched
    };

    struct Fetch {
        const uint8_t *at, *to;

        // Read in two parts, the two may be of different jobs: only hints for the caches come of it.
        explicit Fetch(const Run& run)
            : at(run.from.load(std::memory_order_relaxed)), to(run.to.load(std::memory_order_relaxed)) {}

        bool line() {
            if (at >= to) return false;
            __builtin_prefetch(at, 0, 2);
            at += 64;
            return true;
        }
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
                function_(context_, chunk, thread);
        }
    }

    void work(int thread) {
        uint64_t seen = 0;
        for (;;) {
            if (!watch(seen, runs_[thread])) sleep(seen);
            seen = epoch_.load();
            if (stop_.load()) return;
            active_.fetch_add(1);
            if (open_.load()) take(thread);
            active_.fetch_sub(1);
        }
    }

    bool watch(uint64_t seen, const Run& run) const {
        using clock = std::chrono::steady_clock;
        Fetch fetch(run);
        clock::time_point end = clock::now() + std::chrono::microseconds(SPIN_MICROSECONDS);
        do {
            for (int i = 0; i < 16; i++) {
                if (epoch_.load() != seen) return true;
                if (!fetch.line()) pause();
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
