def write(place):
    pass
