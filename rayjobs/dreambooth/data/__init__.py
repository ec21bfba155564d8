"""What a run trains on: photographs, buckets, the schedule, random numbers."""
