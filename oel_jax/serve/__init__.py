"""`oel serve`: a policy behind the API that clients speak."""
