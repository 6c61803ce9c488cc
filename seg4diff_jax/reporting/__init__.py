"""Makes pictures and plots of results for people to look at."""
