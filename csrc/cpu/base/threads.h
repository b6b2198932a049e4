// How many threads there are cores for, and how a thread waits without holding one.
#pragma once

namespace seqaccel::inline base {

// torch's number of threads, but no more than the cores that this process may use (affinity, a container's quota):
// threads that meet at a barrier in every step are slower than one where they take turns on a core.
int team_size();

// Sleeps while *word is `value`, until wake_all; may return earlier.
void sleep_while(int* word, int value);
void wake_all(int* word);

}  // namespace seqaccel::inline base
