// Threads that share out the chunks of one job at a time.
//
// A chunk is taken from an atomic counter by whoever is free, the caller too, so a worker that the system
// has put aside delays nothing but the chunk it holds. Workers watch for the next job for some tens of
// microseconds, the gap between two matrices of a step, and then sleep.

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

    explicit ThreadPool(int threads) : owner_(getpid()) {
        try {
            for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
        } catch (...) {
            end();
            throw;
        }
    }

    ~ThreadPool() { end(); }

    // False in a forked child: the threads are the parent's, to be neither woken, nor joined, nor destroyed.
    bool owned() const { return getpid() == owner_; }

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Calls function(context, i) for every i below chunks; returns when all are done. One caller at a time.
    void run(Function function, void* context, int64_t chunks) {
        if (chunks <= 1 || workers_.empty() || !owned()) {
            for (int64_t i = 0; i < chunks; i++) function(context, i);
            return;
        }
        bool asleep;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            function_ = function;
            context_ = context;
            chunks_ = chunks;
            next_.store(0, std::memory_order_relaxed);
            open_ = true;
            asleep = sleepers_ > 0;
            epoch_.fetch_add(1);
        }
        if (asleep) wake_.notify_all();
        take(function, context, chunks);
        {
            // From here on nobody joins: a worker that wakes up late must not see the next job's fields.
            std::lock_guard<std::mutex> lock(mutex_);
            open_ = false;
        }
        for (int spins = 0; active_.load(std::memory_order_acquire) > 0; spins++) {
            if (spins < 4096) pause();
            else std::this_thread::yield();
        }
    }

private:
    void end() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            epoch_.fetch_add(1);
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void take(Function function, void* context, int64_t chunks) {
        int64_t i;
        while ((i = next_.fetch_add(1, std::memory_order_relaxed)) < chunks) function(context, i);
    }

    void work() {
        uint64_t seen = 0;
        for (;;) {
            watch(seen);
            std::unique_lock<std::mutex> lock(mutex_);
            sleepers_++;
            wake_.wait(lock, [&] { return epoch_.load() != seen; });
            sleepers_--;
            seen = epoch_.load();
            if (stop_) return;
            if (!open_) continue;
            active_.fetch_add(1, std::memory_order_relaxed);
            Function function = function_;
            void* context = context_;
            int64_t chunks = chunks_;
            lock.unlock();
            take(function, context, chunks);
            active_.fetch_sub(1, std::memory_order_release);
        }
    }

    void watch(uint64_t seen) const {
        using clock = std::chrono::steady_clock;
        clock::time_point end = clock::now() + std::chrono::microseconds(SPIN_MICROSECONDS);
        do {
            for (int i = 0; i < 16; i++) {
                if (epoch_.load(std::memory_order_acquire) != seen) return;
                pause();
            }
        } while (clock::now() < end);
    }

    static constexpr int SPIN_MICROSECONDS = 20;

    const pid_t owner_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;  // guards the fields of the job, open_, stop_ and sleepers_
    std::condition_variable wake_;
    Function function_ = nullptr;
    void* context_ = nullptr;
    int64_t chunks_ = 0;
    bool open_ = false;
    bool stop_ = false;
    int sleepers_ = 0;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> active_{0};
};
