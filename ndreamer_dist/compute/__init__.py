"""Where tasks run, and how their progress and cost are observed."""
