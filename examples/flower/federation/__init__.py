"""A federation of clients that keep their data, merged by manyshot's METIS on a Flower server."""
