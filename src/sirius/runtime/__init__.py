"""Running a prepared model: passes over a cache of slots, which neurons each computes, and how it is replayed."""
