// One pool of threads for all kernels. Pieces of a job are claimed one by one, by the caller too, and
// the caller waits only for pieces that somebody has claimed: a thread that the machine keeps busy
// with something else holds nobody up, as it would at a barrier.
#pragma once

#include <atomic>
#include <cstdint>

namespace halyard {

typedef void (*Piece)(const void* job, int64_t index);

// Calls piece(job, i) for i in [0, count) on at most `threads` threads; returns when all are done.
void run_pieces(Piece piece, const void* job, int64_t count, int64_t threads);

// The same for a callable.
template <typename F>
void parallel(int64_t count, int64_t threads, const F& f) {
    if (threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; i++) f(i);
        return;
    }
    run_pieces([](const void* job, int64_t index) { (*static_cast<const F*>(job))(index); }, &f, count,
               threads);
}

}  // namespace halyard
