#include "threads.h"

int64_t timbre_least_work = 30000;
