"""The user side: the deployed policy plays, and what it does is recorded and measured."""
