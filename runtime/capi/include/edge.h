/* edge.h - C interface of libedge, the runtime for small language models.
 *
 * The library never allocates, keeps a file open, starts a thread or calls another library. On 64-bit ARM,
 * edge_plan and edge_open read /proc/self/auxv where Linux or Android has it, to learn whether there are dot-product
 * and matrix instructions; threads of an edge_team sleep there by the system call futex. The caller brings
 *   - the bytes of a model file (GGUF or pack), best mapped read-only;
 *   - one block of memory, the arena, whose size edge_plan tells beforehand;
 *   - threads, if it wants more than its own (edge_team, or edge_workers for a pool that it has already);
 *   - where nobody else tells what its CPU can do beyond the baseline (edge_limits.cpu_features).
 *
 * Use:
 *   edge_limits limits = {0};
 *   limits.context = 1024;
 *   edge_plan_info plan;
 *   edge_error error;
 *   if (edge_plan(model, model_size, &limits, &plan, &error) != 0) { puts(error.message); ... }
 *   void *arena = malloc(plan.arena_bytes);
 *   edge_session *session;
 *   if (edge_open(model, model_size, &limits, NULL, arena, plan.arena_bytes, &session, &error) != 0) ...
 *   edge_generate(session, "Once upon a time", 16, 0, 64, print, NULL);
 *   free(arena);
 *
 * A conversation: chat.json, which edgec writes beside the model, has the texts that the model expects
 * around messages. Generate with flags EDGE_SPECIAL | EDGE_NO_BOS
 *   begin, the user's message, answer        then, on the same session,
 *   next, the user's next message, answer    and so on.
 *
 * Errors: a function that can fail returns a negative number, EDGE_E_... with a minus sign; the
 * message with the place, what was found and what was expected is in the edge_error or, for a
 * session, in edge_last_error. A null pointer, a misaligned pointer, a buffer that is too small and a
 * damaged model file are refused, never followed.
 *
 * Threads: different sessions are independent. One session is used by one thread at a time.
 */
#ifndef EDGE_H
#define EDGE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Grows whenever a struct or the meaning of a function changes. Compare with edge_abi_version(). */
#define EDGE_ABI_VERSION 2u

/* Error numbers; functions return them negated. */
enum {
  EDGE_E_TRUNCATED = 1,            /* the file ends before what it announces */
  EDGE_E_BAD_MAGIC = 2,            /* neither a GGUF file nor a pack */
  EDGE_E_UNSUPPORTED_VERSION = 3,  /* a version of the format that is not read */
  EDGE_E_BAD_LENGTH = 4,           /* a count beyond what the file can hold */
  EDGE_E_BAD_VALUE_TYPE = 5,       /* a metadata value of an unknown type */
  EDGE_E_BAD_TEXT = 6,             /* text that is not UTF-8 */
  EDGE_E_BAD_SHAPE = 7,            /* a tensor with an impossible shape */
  EDGE_E_UNSUPPORTED_TYPE = 8,     /* a tensor type without a kernel */
  EDGE_E_TENSOR_OUT_OF_BOUNDS = 9, /* a tensor outside the file */
  EDGE_E_BAD_ALIGNMENT = 10,       /* a misaligned offset or pointer */
  EDGE_E_MISSING_KEY = 11,         /* a metadata key is absent */
  EDGE_E_WRONG_KEY_TYPE = 12,      /* a metadata key has the wrong type */
  EDGE_E_OUT_OF_RANGE = 13,        /* a number outside its range */
  EDGE_E_MISSING_TENSOR = 14,      /* a tensor is absent */
  EDGE_E_WRONG_SHAPE = 15,         /* a tensor has another shape than the model says */
  EDGE_E_UNKNOWN_FAMILY = 16,      /* a model family that is not implemented */
  EDGE_E_UNSUPPORTED = 17,         /* a feature that is not implemented */
  EDGE_E_ARENA_TOO_SMALL = 18,     /* the arena is smaller than the plan */
  EDGE_E_CONTEXT_FULL = 19,        /* the context window is full */
  EDGE_E_BAD_TOKEN = 20,           /* a token beyond the vocabulary */
  EDGE_E_BUFFER_TOO_SMALL = 21,    /* the caller's buffer is too small */
  EDGE_E_BAD_ARGUMENT = 22,        /* an argument that makes no sense, such as a null pointer */
  EDGE_E_BAD_VOCABULARY = 23,      /* the vocabulary contradicts itself */
  EDGE_E_FORGOTTEN = 24,           /* a cut further back than sliding windows remember */
  EDGE_E_FOREIGN_SESSION = 25,     /* a saved session of another model, version or cache type */
  EDGE_E_BAD_CHECKSUM = 26,        /* a saved session that was damaged */
  EDGE_E_OTHER_VOCABULARY = 27,    /* two models whose vocabularies differ */
  EDGE_E_OTHER_BASE = 28           /* an adapter that was made for another model file */
};

/* A loaded model with its KV cache. It lives in the arena and ends when the caller reuses that. */
typedef struct edge_session edge_session;

/* Why a function failed that has no session yet. */
typedef struct edge_error {
  int32_t code;      /* what the function returned */
  char message[252]; /* text that ends with 0, cut if it is longer */
} edge_error;

/* Bits of edge_limits.cpu_features. A set bit promises that this CPU, and the operating system on it,
 * have the feature; with one that lies, the process ends by a signal. Bits of another architecture are ignored. On
 * 64-bit ARM under Linux and Android all are, since the system itself is asked. Elsewhere, for instance,
 *   iOS: sysctlbyname("hw.optional.arm.FEAT_DotProd", ...) and "hw.optional.arm.FEAT_I8MM" give 1;
 *   QNX and bare metal: the fields DP and I8MM of ID_AA64ISAR0_EL1 and ID_AA64ISAR1_EL1, or the CPU's manual. */
#define EDGE_CPU_AVX2 (UINT64_C(1) << 0)    /* x86-64 */
#define EDGE_CPU_DOTPROD (UINT64_C(1) << 1) /* 64-bit ARM: 8-bit dot products */
#define EDGE_CPU_I8MM (UINT64_C(1) << 2)    /* 64-bit ARM: 8-bit matrix products; only together with DOTPROD */

/* Values of edge_limits.cache_type. */
#define EDGE_CACHE_F16 1u
#define EDGE_CACHE_F32 2u
#define EDGE_CACHE_Q8_0 3u /* 17/32 of the memory of F16; heads must be a multiple of 32 wide */

/* What a session may use. All zero is a good beginning. */
typedef struct edge_limits {
  uint32_t context;      /* most tokens in the KV cache; 0: as many as the model was trained for */
  uint32_t batch;        /* prompt tokens that are computed together; 0: 32 */
  uint32_t workers;      /* threads, the calling one included; 0: 1 */
  uint32_t text_bytes;   /* longest text to be tokenized at once; 0: 4 for each token of context */
  uint64_t cpu_features; /* EDGE_CPU_ bits; 0: what every CPU of this architecture has */
  uint32_t adapters;     /* slots for LoRA adapters; 0: none */
  uint32_t adapter_rank; /* largest rank of an adapter, at most 256; read only if there are slots */
  uint32_t cache_type;   /* EDGE_CACHE_: how keys and values are kept; 0: as precise as the weights */
} edge_limits;

/* What a session will need. */
typedef struct edge_plan_info {
  uint64_t arena_bytes;   /* size of the arena, which may start anywhere */
  uint64_t kv_bytes;      /* the part of it that is the KV cache */
  uint32_t context;       /* most tokens in the KV cache */
  uint32_t vocabulary;    /* number of tokens, and of logits */
  uint32_t text_bytes;    /* longest text to be tokenized at once */
  uint32_t has_tokenizer; /* 1, or 0 for a file without a vocabulary: then token numbers only */
} edge_plan_info;

/* Threads of the caller. `run` calls job(job_context, 0), ... job(job_context, count - 1), each at most
 * once and one at least, possibly at the same time on different threads, and returns when all have returned. One
 * of the calls may be on the calling thread. A call does what no other has done yet, so that none need wait for a
 * thread that has not begun. */
typedef struct edge_workers {
  uint32_t count; /* threads, the calling one included if it takes part; equals edge_limits.workers */
  void *context;  /* handed to run; may be used from any thread that calls edge_ functions */
  void (*run)(void *context, void (*job)(void *job_context, uint32_t index), void *job_context);
} edge_workers;

/* A group of threads that the application starts and the library lets work:
 *
 *   edge_team team;
 *   edge_workers workers;
 *   edge_team_init(&team, 4, NULL, &workers);     limits.workers = 4; edge_open(..., &workers, ...)
 *   three threads: edge_worker_run(&team);        best on the big cores only, and no more than there are of them
 *   ... edge_feed, edge_generate ...              the calling thread is the fourth
 *   edge_team_stop(&team); join the threads.
 *
 * Threads may come late, be fewer, or go while a session computes: what they do not do, the calling thread does. It
 * waits for none but those at work. Between jobs they wait awake for some 0.1 ms, then sleep. */
typedef struct edge_team {
  uint64_t opaque[16];
} edge_team;

/* How the threads of a team sleep, for systems other than Linux and Android. `wait` sleeps as long as *word, read
 * atomically, is `value`; it may return at any time, also at once. `wake` ends every sleep on *word, also
 * one that begins at this moment with a value that *word no longer has: with a mutex and a condition variable, compare
 * and wait under the mutex, lock and unlock it before the broadcast. */
typedef struct edge_waiting {
  void *context; /* handed to both; may be used from any thread of the team */
  void (*wait)(void *context, const uint32_t *word, uint32_t value);
  void (*wake)(void *context, const uint32_t *word);
} edge_waiting;

/* How edge_next chooses. All zero is greedy. */
typedef struct edge_sampling {
  float temperature;      /* 0: always the most likely token */
  uint32_t top_k;         /* only the k most likely tokens; 0: all */
  float top_p;            /* only the most likely tokens that together reach p; 0 or 1: all */
  float min_p;            /* only tokens at least p times as likely as the most likely one; 0: all */
  float repeat_penalty;   /* makes recent tokens less likely; 0 or 1: not */
  uint32_t repeat_window; /* how many recent tokens that looks at */
  uint64_t seed;          /* the same seed gives the same tokens */
} edge_sampling;

/* Flags of edge_tokenize and edge_generate. */
#define EDGE_SPECIAL 1u /* the text may name control tokens such as <|im_end|>: for templates only */
#define EDGE_NO_BOS 2u  /* without the token that begins a text, even if the model asks for it */

/* Takes text as it is generated: whole UTF-8 characters, not terminated. Returns 0 to go on. It must
 * not use the session. */
typedef int32_t (*edge_on_text)(void *context, const char *text, size_t length);

/* EDGE_ABI_VERSION of the library. */
uint32_t edge_abi_version(void);

/* A short English text for an error number, negated or not. Never null. */
const char *edge_error_text(int32_t code);

/* Checks a model and says what a session on it needs. `error` may be null. */
int32_t edge_plan(const void *model, size_t model_size, const edge_limits *limits,
                  edge_plan_info *plan, edge_error *error);

/* Begins a session in `arena`. The model's bytes, the arena, and `workers` with what it points to stay
 * in place and unchanged as long as the session is used; there is nothing to close. `workers` may be
 * null for the calling thread alone. `error` may be null. */
int32_t edge_open(const void *model, size_t model_size, const edge_limits *limits,
                  const edge_workers *workers, void *arena, size_t arena_size,
                  edge_session **session, edge_error *error);

/* Makes a team of about `count` threads, the one that uses sessions among them, and the `workers` that stand for it.
 * The team stays where it is as long as sessions or threads use it. Several sessions may share it; of those that
 * compute at the same moment, one has the threads. With `waiting` null its threads sleep by a futex on Linux and
 * Android; elsewhere they wait on the spot (64-bit ARM: wfe) until edge_team_stop. Returns 0. */
int32_t edge_team_init(edge_team *team, uint32_t count, const edge_waiting *waiting, edge_workers *workers);

/* Lets the calling thread work in the team. Returns 0 after edge_team_stop. */
int32_t edge_worker_run(edge_team *team);

/* Makes edge_worker_run return in every thread that is in it or calls it later; from any thread, at any time. Sessions
 * go on with the calling thread alone. When all have returned the team may be made anew. Returns 0. */
int32_t edge_team_stop(edge_team *team);

/* Writes the last error of a session into `buffer`, ended with 0 and cut if need be. Returns its whole
 * length without the 0; 0 if nothing has failed yet. */
int32_t edge_last_error(const edge_session *session, char *buffer, size_t capacity);

/* Writes the name of the kernels that a session runs on (such as "neon", "dotprod" or "i8mm") into `buffer`, as
 * edge_last_error does. */
int32_t edge_kernels(const edge_session *session, char *buffer, size_t capacity);

/* Turns text, any bytes, into tokens and returns how many. There are at most 2 * `length` + 1; with a
 * byte-level vocabulary at most `length` + 1. */
int32_t edge_tokenize(edge_session *session, const char *text, size_t length, uint32_t flags,
                      uint32_t *tokens, size_t capacity);

/* Writes the bytes of a token, not terminated, and returns how many. They may begin or end within a
 * UTF-8 character. Control tokens have none. */
int32_t edge_piece(edge_session *session, uint32_t token, char *buffer, size_t capacity);

/* 1 if the token ends a text or a turn, otherwise 0. */
int32_t edge_is_end(edge_session *session, uint32_t token);

/* Appends tokens to the context and computes the logits after the last one. Returns 0. */
int32_t edge_feed(edge_session *session, const uint32_t *tokens, size_t count);

/* The logits after the last token that was fed: `count` floats that stay until the next edge_feed,
 * edge_truncate or edge_generate. Null, with count 0, before any. `count` may be null. */
const float *edge_logits(edge_session *session, size_t *count);

/* Number of tokens in the context. */
int32_t edge_position(edge_session *session);

/* Drops all tokens from position `count` on, and the logits if there were any such. Returns 0. Layers with a
 * sliding window keep one batch more than their window: a cut further back, unless to 0, is
 * EDGE_E_FORGOTTEN. */
int32_t edge_truncate(edge_session *session, size_t count);

/* Makes room in a full context: forgets `discard` tokens behind the first `keep`, and moves those after them up. Their
 * keys are turned to their new positions, exactly up to the rounding of the cache's type; what they took from the
 * tokens that went stays in them, and so do the logits. Models with sliding windows are refused
 * (EDGE_E_UNSUPPORTED), as are more tokens than there are (EDGE_E_OUT_OF_RANGE). Keeping what begins the text and half
 * of the rest is a good beginning. Returns 0. */
int32_t edge_shift(edge_session *session, size_t keep, size_t discard);

/* Keeps the tokens that the context and `tokens` both begin with (all but the last of `tokens` at most), and
 * drops the rest. Returns how many are kept: tokens[kept] and those after it are what to feed. */
int32_t edge_reuse(edge_session *session, const uint32_t *tokens, size_t count);

/* Bytes that edge_save writes now. */
uint64_t edge_saved_bytes(const edge_session *session);

/* Writes tokens, cache and logits into `buffer`, without adapters. Returns 0. */
int32_t edge_save(edge_session *session, void *buffer, size_t capacity);

/* Puts what edge_save wrote in place of this session's tokens, cache and logits, on the same model with the
 * same cache type and a context that is large enough; everything is checked first, and refused bytes
 * change nothing. Returns 0. */
int32_t edge_restore(edge_session *session, const void *bytes, size_t size);

/* Puts a LoRA adapter (a GGUF file) into slot 0 to edge_limits.adapters - 1, in place of the one that is
 * there. Tokens that are fed from now on are computed with it, times `scale`, besides the adapters of other
 * slots; tokens in the context stay as they are. The file is copied: its bytes are not needed afterwards.
 * One that does not fit the model, or names another file than the one that this pack was made from, is refused, and
 * the slot stays as it was; after EDGE_E_OUT_OF_RANGE for a weight that is not finite it is empty. Returns 0. */
int32_t edge_attach(edge_session *session, uint32_t slot, const void *adapter, size_t adapter_size,
                    float scale);

/* Changes what an adapter is multiplied by; 0 switches it off and costs nothing. Returns 0. */
int32_t edge_set_adapter_scale(edge_session *session, uint32_t slot, float scale);

/* Empties a slot. Returns 0. */
int32_t edge_detach(edge_session *session, uint32_t slot);

/* Sets how edge_next chooses, from a fresh seed. Null is greedy, as in the beginning. Returns 0. */
int32_t edge_set_sampling(edge_session *session, const edge_sampling *sampling);

/* Chooses a token from the logits and returns it. It is not fed. */
int32_t edge_next(edge_session *session);

/* Tokenizes and feeds `prompt`, then chooses and feeds tokens until one ends the text (that one is not
 * fed), `max_tokens` were fed or `on_text` asks to stop. Only a context that is still empty gets the
 * token that begins a text. `on_text` may be null. Returns how many tokens were generated. */
int32_t edge_generate(edge_session *session, const char *prompt, size_t length, uint32_t flags,
                      uint32_t max_tokens, edge_on_text on_text, void *context);

#ifdef __cplusplus
}
#endif

#endif /* EDGE_H */
