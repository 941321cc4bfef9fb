"""Small examples of user code, made to be copied. The tests run all of them."""
