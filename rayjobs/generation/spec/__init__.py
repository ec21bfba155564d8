"""What a job is: its records by arithmetic, its plan, and its part of the lock."""
