/* Loads libedge.so, continues a prompt with the most likely tokens and prints their numbers, then the kernels.
 *
 *   dlopen LIBRARY MODEL PROMPT MAX_TOKENS THREADS [HOW] [CPU_FEATURES]
 *
 * HOW is
 *   own     the program's own threads, one for each share (the default)
 *   team    an edge_team whose threads sleep as the system has it
 *   calls   an edge_team whose threads sleep by functions of this program
 * Teams lose their threads after half of the tokens, and get them back late.
 * With -DEDGE_STATIC the library is linked in and LIBRARY is not looked at. Everything goes through
 * edge.h, as an application would do it: a mapped file, one arena, own threads. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edge.h"

#define FUNCTIONS(X)                                                                                \
  X(edge_abi_version) X(edge_error_text) X(edge_plan) X(edge_open) X(edge_last_error)               \
  X(edge_tokenize) X(edge_piece) X(edge_is_end) X(edge_feed) X(edge_logits) X(edge_position)        \
  X(edge_truncate) X(edge_set_sampling) X(edge_next) X(edge_generate) X(edge_kernels)               \
  X(edge_team_init) X(edge_worker_run) X(edge_team_stop)

static struct {
#define FIELD(name) __typeof__(&name) name;
  FUNCTIONS(FIELD)
} api;

static void fail(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(1);
}

static void load(const char *path) {
#ifdef EDGE_STATIC
  (void)path;
#define LOAD(name) api.name = &name;
#else
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) fail("dlopen", dlerror());
#define LOAD(name)                                                                                  \
  api.name = (__typeof__(api.name))dlsym(library, #name);                                           \
  if (api.name == NULL) fail(#name, "not exported");
#endif
  FUNCTIONS(LOAD)
}

/* One thread for each share, started anew for each job: slow, and simple enough to be right. */
struct share {
  void (*job)(void *, uint32_t);
  void *context;
  uint32_t index;
};

static void *run_share(void *argument) {
  struct share *share = argument;
  share->job(share->context, share->index);
  return NULL;
}

static void run_threads(void *context, void (*job)(void *, uint32_t), void *job_context) {
  uint32_t count = *(const uint32_t *)context;
  pthread_t threads[64];
  struct share shares[64];
  for (uint32_t i = 1; i < count; i++) {
    shares[i] = (struct share){job, job_context, i};
    if (pthread_create(&threads[i], NULL, run_share, &shares[i]) != 0) fail("pthread_create", "refused");
  }
  job(job_context, 0);
  for (uint32_t i = 1; i < count; i++) pthread_join(threads[i], NULL);
}

/* How threads sleep by functions of the program. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static uint32_t sleeps;

static void wait_changed(void *context, const uint32_t *word, uint32_t value) {
  pthread_mutex_lock(&lock);
  __atomic_add_fetch((uint32_t *)context, 1, __ATOMIC_RELAXED);
  while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == value) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
}

static void wake_all(void *context, const uint32_t *word) {
  (void)context, (void)word;
  pthread_mutex_lock(&lock);
  pthread_mutex_unlock(&lock);
  pthread_cond_broadcast(&changed);
}

static edge_team team;
static pthread_t members[64];

static void *run_member(void *argument) {
  (void)argument;
  if (api.edge_worker_run(&team) != 0) fail("edge_worker_run", "refused");
  return NULL;
}

static void begin_team(uint32_t count, int calls, edge_workers *workers) {
  edge_waiting waiting = {&sleeps, wait_changed, wake_all};
  if (api.edge_team_init(&team, count, calls ? &waiting : NULL, workers) != 0) fail("edge_team_init", "refused");
}

static void join_team(uint32_t count) {
  for (uint32_t i = 1; i < count; i++)
    if (pthread_create(&members[i], NULL, run_member, NULL) != 0) fail("pthread_create", "refused");
}

static void end_team(uint32_t count) {
  if (api.edge_team_stop(&team) != 0) fail("edge_team_stop", "refused");
  for (uint32_t i = 1; i < count; i++) pthread_join(members[i], NULL);
}

/* Waits until at least `count` threads have begun to sleep. */
static void fall_asleep(uint32_t count) {
  usleep(20000);
  for (int i = 0; __atomic_load_n(&sleeps, __ATOMIC_RELAXED) < count; i++) {
    if (i == 10000) fail("edge_waiting", "nobody sleeps");
    usleep(1000);
  }
}

static edge_session *session;

static int32_t checked(const char *what, int32_t result) {
  if (result < 0) {
    char message[512] = "";
    api.edge_last_error(session, message, sizeof message);
    fail(what, message);
  }
  return result;
}

struct text {
  char bytes[1 << 16];
  size_t length;
};

static int32_t append(void *context, const char *bytes, size_t length) {
  struct text *text = context;
  if (length > sizeof text->bytes - text->length) return 1;
  memcpy(text->bytes + text->length, bytes, length);
  text->length += length;
  return 0;
}

int main(int argc, char **argv) {
  if (argc < 6 || argc > 8) fail("usage", "dlopen LIBRARY MODEL PROMPT MAX_TOKENS THREADS [HOW] [CPU_FEATURES]");
  load(argv[1]);
  if (api.edge_abi_version() != EDGE_ABI_VERSION) fail("edge_abi_version", "another version");

  int file = open(argv[2], O_RDONLY);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) fail(argv[2], "cannot be opened");
  size_t size = (size_t)status.st_size;
  const void *model = mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
  if (model == MAP_FAILED) fail(argv[2], "cannot be mapped");

  const char *prompt = argv[3];
  uint32_t max_tokens = (uint32_t)atoi(argv[4]), count = (uint32_t)atoi(argv[5]);
  if (count < 1 || count > 64) fail("THREADS", "1 to 64");
  edge_limits limits = {0};
  limits.context = (uint32_t)strlen(prompt) + 1 + max_tokens;
  limits.workers = count;
  limits.cpu_features = argc > 7 ? strtoull(argv[7], NULL, 0) : 0;
  edge_workers workers = {count, &count, run_threads};
  const char *how = argc > 6 ? argv[6] : "own";
  int is_team = strcmp(how, "own") != 0, calls = strcmp(how, "calls") == 0;
  if (is_team) {
    begin_team(count, calls, &workers);
    join_team(count);
  }
  edge_plan_info plan;
  edge_error error;
  if (api.edge_plan(model, size, &limits, &plan, &error) != 0) fail("edge_plan", error.message);
  void *arena = malloc(plan.arena_bytes);
  if (arena == NULL) fail("malloc", "no memory");
  /* What was in the arena before must not matter. */
  memset(arena, 0xA5, plan.arena_bytes);
  if (api.edge_open(model, size, &limits, count > 1 ? &workers : NULL, arena, plan.arena_bytes, &session,
                    &error) != 0)
    fail("edge_open", error.message);

  uint32_t *tokens = malloc((strlen(prompt) + 1) * sizeof *tokens);
  int32_t prompt_tokens =
      checked("edge_tokenize", api.edge_tokenize(session, prompt, strlen(prompt), 0, tokens, strlen(prompt) + 1));
  checked("edge_feed", api.edge_feed(session, tokens, (size_t)prompt_tokens));
  printf("[");
  uint32_t generated = 0;
  while (generated < max_tokens) {
    uint32_t token = (uint32_t)checked("edge_next", api.edge_next(session));
    if (checked("edge_is_end", api.edge_is_end(session, token))) break;
    printf(generated++ == 0 ? "%u" : ",%u", token);
    /* Once with all threads asleep, and from the middle on without them. */
    if (is_team && generated == 3) fall_asleep(calls ? count - 1 : 0);
    if (is_team && generated == max_tokens / 2) end_team(count);
    checked("edge_feed", api.edge_feed(session, &token, 1));
  }
  if (is_team && generated < max_tokens / 2) fail("edge_next", "too few tokens for a team to go and come back");
  char kernels[32] = "";
  checked("edge_kernels", api.edge_kernels(session, kernels, sizeof kernels));
  printf("]\n%s\n", kernels);

  /* The same once more by the convenience function, in the same session, with threads that come late. */
  if (is_team) {
    begin_team(count, calls, &workers);
    checked("edge_truncate", api.edge_truncate(session, 0));
    checked("edge_feed", api.edge_feed(session, tokens, (size_t)prompt_tokens));
    join_team(count);
  }
  static struct text text;
  checked("edge_truncate", api.edge_truncate(session, 0));
  int32_t again =
      checked("edge_generate", api.edge_generate(session, prompt, strlen(prompt), 0, max_tokens, append, &text));
  if ((uint32_t)again != generated) fail("edge_generate", "another number of tokens");
  if (api.edge_position(session) != prompt_tokens + again) fail("edge_position", "another position");
  printf("%.*s\n", (int)text.length, text.bytes);
  if (is_team) end_team(count);
  free(tokens);
  free(arena);
  return 0;
}
