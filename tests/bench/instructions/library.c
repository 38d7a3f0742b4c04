/* `edge-run bench MODEL -p N -n N -r N -t 1`, as far as instructions.sh asks for it, through libedge: what the device
 * library spends, beside what the program does that is compiled for speed alone. Nothing is printed.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edge.h"

static void check(int32_t result, const char *what) {
    if (result < 0) {
        fprintf(stderr, "%s: %s\n", what, edge_error_text(result));
        exit(1);
    }
}

/* The value of an argument; 0 without it. */
static uint32_t value(int argc, char **argv, const char *name) {
    for (int i = 3; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], name) == 0) return (uint32_t)atoi(argv[i + 1]);
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 3 || strcmp(argv[1], "bench") != 0) return 2;
    uint32_t prompt = value(argc, argv, "-p"), generated = value(argc, argv, "-n"), runs = value(argc, argv, "-r");
    uint32_t most = prompt > generated ? prompt : generated;

    int file = open(argv[2], O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) return 1;
    size_t size = (size_t)status.st_size;
    const void *model = mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (model == MAP_FAILED || most == 0) return 1;

    edge_limits limits = {.context = most, .batch = prompt > 0 ? prompt : 1};
    edge_plan_info plan;
    edge_error error;
    edge_session *session;
    if (edge_plan(model, size, &limits, &plan, &error) != 0) return fprintf(stderr, "%s\n", error.message), 1;
    void *arena = malloc(plan.arena_bytes);
    uint32_t *tokens = malloc(most * sizeof *tokens);
    if (arena == NULL || tokens == NULL) return 1;
    if (edge_open(model, size, &limits, NULL, arena, plan.arena_bytes, &session, &error) != 0)
        return fprintf(stderr, "%s\n", error.message), 1;
    for (uint32_t i = 0; i < most; i++) tokens[i] = (uint32_t)(i * UINT64_C(2654435761) % plan.vocabulary);
    /* Once to warm up, as edge-run does. */
    for (uint32_t run = 0; run <= runs; run++) {
        check(edge_truncate(session, 0), "edge_truncate");
        if (prompt > 0) check(edge_feed(session, tokens, prompt), "edge_feed");
        for (uint32_t i = 0; i < generated; i++) check(edge_feed(session, &tokens[i], 1), "edge_feed");
    }
    return 0;
}
