"""The bundle: the directory that export writes and the runtime loads."""
